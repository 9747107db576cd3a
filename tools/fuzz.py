"""Feed what reads foreign input with damaged and made-up input: `python -m tools.fuzz` (`make fuzz`).

Configurations, safetensors, JSON lines, recorded targets, command lines: each for `--seconds` in its own process.
Whatever comes, it is taken, or refused in one line; nothing else is raised, no case takes more than five seconds of
CPU, and the process stays below a gigabyte. A case follows from the seed and its number. Exit status 1 where one
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tools import fuzz_sources

SECONDS, MEGABYTES = 5.0, 1000
MARK = "<!-- fuzz: results -->"
DEEP = 100_000

# --- Made-up JSON, damaged bytes


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, and what Python's reader takes beside it."""
    kinds = [
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.choice([0, 1, -1, 2**31, 2**63, -(2**70), 10**400]),
        lambda: rng.choice([0.5, -0.0, 1e308, float("nan"), float("inf")]), lambda: text(rng),
    ]  # fmt: skip
    if depth < 3:
        kinds += [lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
                  lambda: {text(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}]  # fmt: skip
    return rng.choice(kinds)()


def text(rng: random.Random) -> str:
    letters = "ab0 .:/\\-\"'\n\0é中\ud800\u2028%@~$"
    return (
        rng.choice(["", "../x", "a" * 300]) if rng.random() < 0.1 else "".join(rng.choices(letters, k=rng.randrange(8)))
    )


def nested(rng: random.Random) -> bytes:
    """Deeper than a parser that calls itself can go."""
    return rng.choice([b"[", b'{"a":']) * DEEP


def spoil(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree of JSON with one to three of its leaves or branches replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        at, found = tree, None
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            found = at, key
            if rng.random() < 0.3:
                break
            at = at[key]
        if found is None:
            continue
        holder, key = found
        how = rng.randrange(4)
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[text(rng)] = value(rng)
        else:
            holder[key] = value(rng)
    return tree


def damaged(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.05 or not raw:
        return rng.choice([b"", nested(rng), rng.randbytes(100)])
    return fuzz_sources.damage(raw, rng.choice(fuzz_sources.DAMAGES), rng)[0]


# --- What reads it. Each is called with a folder, and then with dice for every case; True where the input was taken.

Case = Callable[[random.Random], bool]


def config(folder: Path) -> Case:
    """A run's config.json, as `llama4 train RUN` reads it."""
    import configs
    from launch.train import find
    from training.record import run_record

    names = ("pretrain:tiny", "codistill:tiny", "pretrain:tiny_long", "pretrain:tiny_images")
    trees = [run_record(configs.find(name), "0")["config"] for name in names]

    def case(rng: random.Random) -> bool:
        tree = rng.choice(trees)
        raw = json.dumps(spoil(tree, rng)).encode(errors="surrogatepass")
        (folder / "config.json").write_bytes(raw if rng.random() < 0.7 else damaged(json.dumps(tree).encode(), rng))
        return find(str(folder)) is not None

    return case


def safetensors(folder: Path) -> Case:
    """A folder's headers and index, and all that its tensors hold."""
    from training.safetensors_header import ALL_DTYPES, INDEX, header_bytes, index_text, stored_tensors

    tensors = [("a", "F32", (3, 5)), ("b", "BF16", (7,)), ("c", "I8", (2, 2, 2))]
    sizes = [int(np.prod(shape)) * ALL_DTYPES[dtype].itemsize for _, dtype, shape in tensors]
    whole = header_bytes(tensors) + bytes(sum(sizes))
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    index = index_text({"x-1.safetensors": tensors[:2], "x-2.safetensors": tensors[2:]})
    parts = {"x-1.safetensors": header_bytes(tensors[:2]) + bytes(sum(sizes[:2])),
             "x-2.safetensors": header_bytes(tensors[2:]) + bytes(sizes[2])}  # fmt: skip

    def case(rng: random.Random) -> bool:
        for file in folder.iterdir():
            file.unlink()
        how = rng.randrange(4)
        if how < 2:
            made = json.dumps(spoil(header, rng)).encode(errors="surrogatepass")
            made = made if rng.random() < 0.95 else nested(rng)
            said = len(made) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63, 2**64 - 1])
            raw = struct.pack("<Q", said) + made + whole[8 + length :]
            (folder / "model.safetensors").write_bytes(raw if how else damaged(whole, rng))
        else:
            files = {INDEX: index.encode(), **parts}
            broken = rng.choice(list(files))
            for name, raw in files.items():
                (folder / name).write_bytes(damaged(raw, rng) if name == broken and how == 3 else raw)
            if how == 2:
                (folder / INDEX).write_text(json.dumps(spoil(json.loads(index), rng)), errors="surrogatepass")
        for stored in stored_tensors(epath.Path(folder)).values():
            if stored.dtype in ALL_DTYPES:
                assert stored.whole().shape == stored.shape
        return True

    return case


def jsonl(folder: Path) -> Case:
    """Documents: every line is read or counted."""
    from data import sources

    good = [{"text": f"document {i} größe", "domain": "ab"[i % 2]} for i in range(6)]

    def line(rng: random.Random) -> bytes:
        kind = rng.randrange(6)
        if kind == 0:
            return damaged(json.dumps(rng.choice(good)).encode(), rng)
        if kind == 1:
            return json.dumps(spoil(rng.choice(good), rng)).encode(errors="surrogatepass")
        if kind == 2:
            return json.dumps(value(rng)).encode(errors="surrogatepass") if rng.random() < 0.9 else nested(rng)
        return json.dumps(rng.choice(good), ensure_ascii=rng.random() < 0.5).encode()

    def case(rng: random.Random) -> bool:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        raw = b"\n".join(line(rng) for _ in range(rng.randint(1, 12)))
        (folder / "d.jsonl").write_bytes(raw)
        found = sources.open_sources({"x": str(folder / "d.jsonl")}, epath.Path(folder / "cache"), 0.999)
        read = [source[i] for source in found for i in range(len(source))]
        lines = sum(bool(x.strip()) for x in raw.split(b"\n"))
        bad = sum(source.skipped for source in found)
        assert len(read) + bad == lines, f"{len(read)} read and {bad} counted of {lines} lines"
        return True

    return case


def targets(folder: Path) -> Case:
    """A store of targets: what it says of a batch is of that batch, or nothing."""
    from data.batch import Batch
    from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
    from training.targets import Form, Identity, Reader, Writer, pieces

    dice, shape, form = np.random.default_rng(0), (2, 16), Form("stratified", 3, 2)
    tokens = dice.integers(0, 99, shape).astype(np.int32)
    segments, places = (np.tile(np.arange(16), (2, 1)) // 5 + 1).astype(np.int32), np.tile(np.arange(16), (2, 1)) % 5
    nothing = np.zeros(shape, np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), segments, places.astype(np.int32), np.ones(shape, np.float32),
                  nothing, nothing > 0, nothing)  # fmt: skip
    ids = np.stack([dice.permutation(99)[: form.entries] for _ in range(32)]).reshape(*shape, -1).astype(np.int32)
    mass = np.sort(dice.dirichlet(np.ones(form.entries), shape), axis=-1)[..., ::-1].astype(np.float32)
    plain = np.zeros(shape, np.float32)
    with Writer(folder / "whole", Identity("t", 99, "teacher", form=form)) as writer:
        made = (ids, mass, plain, plain, plain, plain, np.ones(shape, bool))
        writer.add(pieces(batch), SparseTargets._make(made))
    files = {file.name: file.read_bytes() for file in (folder / "whole").iterdir()}
    with Reader(folder / "whole") as reader:
        want = reader.look_up(batch)
    assert want.present.all()

    def case(rng: random.Random) -> bool:
        here, broken = folder / "here", rng.choice(list(files))
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        for name, raw in files.items():
            if name == broken and name.endswith(".json") and rng.random() < 0.7:
                raw = json.dumps(spoil(json.loads(raw), rng)).encode(errors="surrogatepass")
            elif name == broken:
                raw = damaged(raw, rng) if rng.random() < 0.95 else None
            if raw is not None:
                (here / name).write_bytes(raw)
        with Reader(here, tokenizer="t", vocab_size=99) as reader:
            reader.counts()
            got = reader.look_up(batch)
        for a, b in zip(got, want, strict=True):
            if reader.form == form:
                assert a.dtype == b.dtype and np.array_equal(a[got.present], b[got.present]), "targets of other tokens"
        return True

    return case


def cli(folder: Path) -> Case:
    """Command lines, those left out that would begin to work or to wait: `demo`, `doctor` and the like; and of those
    that train, plan or serve an option that cannot be is always a part."""
    import configs
    from launch import cli
    from launch.cli import COMMANDS

    works = ("train", "launch", "targets", "bench", "plan", "continue", "inspect", "data", "generate")
    words = [
        *configs.PRESETS,
        "pretrain:tinny", "nowhere", "nowhere@3", "x@y", "@", "-1", "nan", "=", "--", "-", "--json",
        "--out", "--to", "--from", "--steps", "--train.steps", "--train.steps=x", "--mesh.fsdp=0",
        "--mesh.fsdp", "--learners.scout.remat", "--init", "hf:nowhere", "run:nowhere", "shared:nowhere",
        "--data.sources", "a=b", "--data.weights", "--topology", "v5p:4x4x8", "h100:0x8", "slurm", "list",
        "verify", "seal", "diff", "write", "info", "serve", "step", "distill", "convert", "ledger",
        "encode", "--listen", "x:99999", "--against", "--prompt", "--max-memory", "1XB", "--dtype", "--help"
    ]  # fmt: skip
    commands = [name for name in COMMANDS if name not in ("demo", "doctor", "board")]

    def case(rng: random.Random) -> bool:
        command = rng.choice(commands) if rng.random() < 0.95 else text(rng)
        line = [rng.choice(words) if rng.random() < 0.8 else text(rng) for _ in range(rng.randrange(6))]
        if command in works:
            line.insert(rng.randint(1, len(line)) if line else 0, "--train.steps=nan")
        os.chdir(folder)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main([command, *line])
            except SystemExit as exit:
                status = exit.code
        said = err.getvalue().splitlines()
        assert status == 0 or (status in (1, 2) and said and said[-1].startswith("llama4: error: ")), (
            f"{command} {line}: status {status}, said {said[-1:]}"
        )
        return status == 0

    return case


READERS = dict(config=config, safetensors=safetensors, jsonl=jsonl, targets=targets, cli=cli)

# --- The program


class Hang(BaseException):
    """A case that does not end."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """`Hang` after `SECONDS` of this process's own time."""

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Result(NamedTuple):
    cases: int
    taken: int
    refused: int
    failed: list[str]
    """Number and end of each case that was neither."""
    slowest: float
    megabytes: float
    """The most that the process had in memory."""


def attempt(case: Case, rng: random.Random) -> str:
    """taken, refused, or what else came of a case."""
    try:
        with bounded():
            return "taken" if case(rng) else "refused"
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        return "refused" if said and "\n" not in said and len(said) < 2000 else f"not one line: {said[:200]!r}"
    except Hang:
        return f"no end within {SECONDS:.0f} s"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"


def run(name: str, folder: Path, seconds: float = 1e9, cases: int = 10**12, seed: int = 0) -> Result:
    """So many cases of a reader, or so long."""
    case, seen, failed, slowest, number = READERS[name](folder), Counter[str](), [], 0.0, 0
    until = time.monotonic() + seconds
    while number < cases and time.monotonic() < until:
        began = time.process_time()
        word = attempt(case, random.Random(f"{seed}/{name}/{number}"))
        slowest = max(slowest, time.process_time() - began)
        seen[word] += 1
        if word not in ("taken", "refused"):
            failed.append(f"case {number}: {word}")
        number += 1
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Result(number, seen["taken"], seen["refused"], failed, slowest, most)


def alone(name: str, seconds: float, seed: int) -> Result:
    """In a process of its own, which may crash, or hang where no signal reaches it."""
    command = [sys.executable, "-m", "tools.fuzz", "--alone", "--only", name, "--seconds", str(seconds)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, env=environment,
                              timeout=seconds + 300)  # fmt: skip
        return Result(*json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Result(0, 0, 0, [f"no end within {seconds + 300:.0f} s"], 0.0, 0.0)
    except (ValueError, IndexError):
        return Result(0, 0, 0, [f"crashed with status {done.returncode}: {done.stderr[-300:]}"], 0.0, 0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(READERS), help=f"some of {', '.join(READERS)}")
    parser.add_argument("--seconds", type=float, default=120, help="for each (120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="a file to write the table into")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(READERS)):
        parser.error(f"nothing here reads {unknown[0]!r}; there are {', '.join(READERS)}")
    if args.alone:
        with tempfile.TemporaryDirectory() as folder:
            result = run(names[0], Path(folder), args.seconds, seed=args.seed)
            os.chdir("/")
        print(json.dumps(result))
        return 0
    failed = 0
    for name in names:
        got = alone(name, args.seconds, args.seed)
        large = got.megabytes > MEGABYTES
        failed += len(got.failed) + large
        counts = f"{got.cases:,} | {got.taken:,} | {got.refused:,} | {len(got.failed)}"
        line = f"| {name} | {counts} | {got.slowest:.2f} s | {got.megabytes:.0f} MB |"
        print(line, *got.failed[:10], *["too much memory"] * large, sep="\n     ", flush=True)
        if args.docs:
            how = f"`--seconds {args.seconds:g} --seed {args.seed}`"
            merge(args.docs, name, f"{line} {time.strftime('%Y-%m-%d')}, {how} |")
    return int(failed > 0)


def merge(file: Path, name: str, new: str) -> None:
    """Put a reader's line into a document, in place of the one it has there."""
    before, _, rest = file.read_text().partition(MARK)
    old, _, after = rest.partition(MARK)
    found = {line.split()[1]: line for line in old.splitlines()[2:] if line.startswith("| ")} | {name: new}
    head = ["| | cases | taken | refused in one line | failed | slowest | memory | on |", "|" + "---|" * 8]
    table = "\n".join([*head, *(found[name] for name in READERS if name in found)])
    file.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}")


if __name__ == "__main__":
    sys.exit(main())
