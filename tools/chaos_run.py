"""What `tools.chaos` breaks: tiny runs in processes of their own that say what they do, forked from a warm one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data.config import DataConfig
from data.loader import Corpus
from llama4_jax.config import tiny_maverick
from training import goodput, loop, reporter, step
from training.checkpoint import Checkpoints
from training.config import Distillation, Learner, MeshConfig, OptimizerConfig, RunConfig, SafetyConfig, TrainConfig
from training.evaluate import HeldOut
from training.stop import Stop

WORDS = ["a", "of", "the", "run", "step", "loss", "model", "layer", "token", "expert", "router", "kill", "save", "disk"]
Marks = dict[str, list[range]]
CLOCK = {"time", "tokens_per_second", "seconds_per_step", "data_wait", "tflops"}
STEPS, EVERY, EVALUATES = 40, 5, 8
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "chaos"
MARKS = {"nan": 99, "spike": 98}  # segment ids that stand for trouble with a batch


def documents(folder: Path, seed: int = 0) -> Path:
    """Some hundred short documents of two domains, as JSONL."""
    file, rng = folder / "documents.jsonl", random.Random(seed)
    texts = [" ".join(rng.choices(WORDS[d::2], k=rng.randint(5, 60))) for _ in range(150) for d in (0, 1)]
    lines = [json.dumps(dict(text=text, domain=("even", "odd")[i % 2])) for i, text in enumerate(texts)]
    file.write_text("\n".join(lines))
    return file


def config(out: Path, steps: int = STEPS, mesh: MeshConfig | None = None, **safety: Any) -> RunConfig:
    """A frozen teacher and a student whose weights follow running means, both tiny."""
    model = replace(
        tiny_maverick(), vocab_size=320, embed_dim=32, num_layers=4, nope_every=2, num_heads=2, num_kv_heads=2,
        head_dim=8, dense_dim=32, expert_dim=16, num_experts=4, chunk=16, floor_scale=8,
    )  # fmt: skip
    plain = Learner(model, None, compute_dtype="float32", remat="none")
    student = replace(plain, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2),
                      distillation=Distillation("teacher", weighting="gradient_norm"))  # fmt: skip
    portions = TrainConfig(steps=steps, batch=8, seq_len=32, log_every=1, eval_every=EVALUATES, eval_batches=2,
                           checkpoint_every=EVERY)  # fmt: skip
    return RunConfig("chaos", dict(teacher=plain, student=student), mesh=mesh or MeshConfig(), train=portions,
                     safety=SafetyConfig(**safety), out=str(out))  # fmt: skip


def open_corpus(folder: Path) -> Corpus:
    data = DataConfig(sources={"text": str(documents(folder))}, vocab_size=320, heldout=0.1)
    return Corpus.open(data, folder / "cache", log=lambda _: None)


def story(folder: Path) -> list[dict[str, Any]]:
    """A run's records without what depends on the clock."""
    from training.metrics import read

    told = read(epath.Path(folder))
    return [{k: v for k, v in r.items() if k not in CLOCK and not k.startswith(goodput.PREFIX)} for r in told]


class Child:
    """A forked process: the lines it sends, its end, its output in a file."""

    def __init__(self, work: Callable[[Callable[[str], None]], int], log: Path, devices: int = 1):
        """`work(say)` returns the exit status; `say` sends a line."""
        mine, theirs = os.pipe()
        self.log, self.status, self._text = log, None, ""
        self.said: list[str] = []
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(mine)
            _become(work, log, theirs, devices)
        os.close(theirs)
        self._lines = mine

    def until(self, pattern: str, timeout: float = 600) -> re.Match[str] | None:
        """The next line that begins like this; None where the process ends before. `said` has all that came."""
        stop = time.monotonic() + timeout
        while time.monotonic() < stop:
            while "\n" in self._text:
                line, _, self._text = self._text.partition("\n")
                self.said.append(line)
                if found := re.match(pattern, line):
                    return found
            if select.select([self._lines], [], [], 0.2)[0]:
                received = os.read(self._lines, 65536).decode()
                if not received:
                    return None
                self._text += received
        raise TimeoutError(f"no {pattern} from {self.log}")

    def numbers(self, word: str) -> list[int]:
        """Those of all lines `WORD NUMBER`, of a process that has ended."""
        return [int(line.split()[1]) for line in self.said if line.startswith(f"{word} ")]

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> int:
        """Exit status, negative for a signal."""
        stop = time.monotonic() + timeout
        while self.status is None:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.until("(?!)")  # what it said last
                self.status = os.waitstatus_to_exitcode(how)
                os.close(self._lines)
            elif time.monotonic() > stop:
                raise TimeoutError(f"{self.log}: still there after {timeout:.0f} s")
            else:
                time.sleep(0.02)
        return self.status

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _become(work: Callable[[Callable[[str], None]], int], log: Path, pipe: int, devices: int) -> None:
    """The child's life; does not return."""
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

        def say(line: str) -> None:
            os.write(pipe, f"{line}\n".encode())

        status = work(say)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(
    cfg: RunConfig, corpus: Corpus, say: Callable[[str], None], marked: dict[str, list[range]] | None = None,
    mortal: bool = False,
) -> int:  # fmt: skip
    """Train as `llama4 train` does, with lines about each phase; `marked` says which batches mean trouble, `mortal`
    that permissions hold for root, too."""
    from launch.train import status

    announce(say)
    if mortal:  # capset(2): no capabilities
        assert not ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "no way to give up rights"
    if marked:
        _mark(marked, cfg, corpus)
    try:
        return status(loop.train(cfg, corpus, partial(print, flush=True)))
    except (FloatingPointError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        say(f"error {' '.join(str(error).split())}")
        return 1


def announce(say: Callable[[str], None]) -> None:
    """Lines `step N`, `evaluation`, `save N`, `sealing N`, `sealed N`, `compile`, `told`, `rows DIGEST`."""

    def before(owner: Any, name: str, text: Callable[..., str], after: Callable[..., str] | None = None) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **how: Any) -> Any:
            say(text(*args))
            out = real(*args, **how)
            if after:
                say(after(*args))
            return out

        setattr(owner, name, wrapped)

    before(reporter.Reporter, "begin", lambda _, pending: f"step {pending.step}")
    before(HeldOut, "__call__", lambda *_: "evaluation")
    before(Checkpoints, "save", lambda _, at, *__: f"save {at}")
    before(Checkpoints, "_seal", lambda _, at: f"sealing {at}", lambda _, at: f"sealed {at}")
    before(Stop, "nothing_to_save", lambda _: "compile")
    before(Stop, "_receive", lambda *_: "told")
    before(loop, "put_local", lambda rows, _: f"rows {sha256(rows.tokens.tobytes()).hexdigest()}")


def _mark(marked: Marks, cfg: RunConfig, corpus: Corpus) -> None:
    """Batches, by their number from 1, whose gradients are NaN, or whose loss and gradients are ten times as large."""
    import jax
    import jax.numpy as jnp

    train, real_put, real_gradient = cfg.train, loop.put_local, step.gradient
    stream = corpus.train(train.batch, train.seq_len, 16, train.seed)
    numbers = {next(stream).tokens.tobytes(): n for n in range(1, 2 * train.steps)}
    stream.close()

    def put(rows: Any, mesh: Any) -> Any:
        if hasattr(rows, "segment_ids"):
            for kind, of in marked.items():
                if any(numbers[rows.tokens.tobytes()] in some for some in of):
                    rows = rows._replace(segment_ids=(rows.segment_ids > 0) * MARKS[kind])
        return real_put(rows, mesh)

    def gradient(*args: Any, **how: Any) -> Any:
        take = real_gradient(*args, **how)

        def troubled(params: Any, batch: Any, *rest: Any) -> Any:
            grads, sums, hidden = take(params, batch, *rest)
            most = batch.segment_ids.max()
            factor = jnp.where(most == MARKS["nan"], jnp.nan, jnp.where(most == MARKS["spike"], 10.0, 1.0))
            grads = jax.tree.map(lambda g: g * factor, grads)
            ce = sums.by_domain["ce"] * jnp.where(most == MARKS["spike"], 10.0, 1.0)
            return grads, sums._replace(by_domain=sums.by_domain | {"ce": ce}), hidden

        return troubled

    loop.put_local, step.gradient = put, gradient


# --- What scenarios share


class Row(NamedTuple):
    """A line of the table: what was done how often, and how often nothing was lost."""

    scenario: str
    injected: int
    held: int
    note: str = ""


class Chaos:
    """What scenarios share: a folder, a corpus, an unbroken run, dice."""

    def __init__(self, folder: Path, seed: int, share: float):
        self.folder, self.share, self.rng, self._children = folder, share, random.Random(seed), list[Child]()
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        self.corpus: Corpus = open_corpus(folder)
        self.whole = config(folder / "whole")
        child = self.start(self.whole)
        child.until(f"save {2 * EVERY}$")
        began = time.monotonic()
        child.until(f"sealed {2 * EVERY}$")
        self.save_seconds = time.monotonic() - began
        assert child.wait() == 0, f"the unbroken run failed, see {child.log}"

    def times(self, full: int) -> int:
        """How often to do what is done so often in full."""
        return max(1, round(full * self.share))

    def start(self, cfg: RunConfig, devices: int = 1, **how: Any) -> Child:
        """A run in a process of its own."""
        return self.fork(lambda say: train(cfg, self.corpus, say, **how), devices)

    def fork(self, work: Callable[[Callable[[str], None]], int], devices: int = 1) -> Child:
        self._children.append(Child(work, self.folder / f"{len(self._children)}.log", devices))
        return self._children[-1]

    def clear(self) -> None:
        """End what a scenario that failed left running, and make room."""
        for child in self._children:
            if child.status is None:
                child.kill(signal.SIGKILL)
                child.wait()
        for left in self.folder.iterdir():
            if left.is_dir() and left.name not in ("whole", "cache"):
                shutil.rmtree(left, ignore_errors=True)

    def differences(self, cfg: RunConfig) -> list[str]:
        """Of a finished run from the unbroken one: records, and the last checkpoint's arrays and place, bit by bit."""
        out = [] if story(Path(cfg.folder)) == story(Path(self.whole.folder)) else ["the records differ"]

        def compare(say: Callable[[str], None]) -> int:
            from training.compare import differences

            found = differences(*((c.folder, c.train.steps) for c in (self.whole, cfg)))
            wrong = [*found["data"], *found["shapes"], *found["arrays"]]
            wrong += [line for line in found["config"] if not line.startswith("config.out:")]
            say(json.dumps(wrong))
            return 0

        out += json.loads(self.answer(compare) or '["the comparison failed"]')
        if out:
            print(f"     {cfg.folder}: {'; '.join(out[:5])}", flush=True)
        return out

    def answer(self, work: Callable[[Callable[[str], None]], int], devices: int = 1, timeout: float = 600) -> str:
        """The last line that a process of its own says; empty where it fails."""
        child = self.fork(work, devices)
        return child.said[-1] if child.wait(timeout) == 0 and child.said else ""

    def finish(self, cfg: RunConfig, **how: Any) -> int:
        return self.start(cfg, **how).wait()
