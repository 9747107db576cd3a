"""Break runs in every way that is known to happen, and see what is lost: `python -m tools.chaos` (`make chaos`).

Each scenario draws its instants and places from the seed, and is a line or several of a table. `--only kill,corrupt`
runs some, `--share 0.1` a tenth of each, `--docs FILE` writes the table where the file has a place for it. Exit status
1 where anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data.loader import Corpus
from tools import chaos_run as runs
from tools.chaos_run import EVALUATES, EVERY, STEPS, Child, config, story
from training import manifest
from training.config import MeshConfig, RunConfig

BOUND = 15
"""Seconds that safety.stuck_after gives in scenarios with stuck processes."""
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "chaos"
MARK = "<!-- chaos: results -->"


class Row(NamedTuple):
    """A line of the table: what was done how often, and how often nothing was lost."""

    scenario: str
    injected: int
    held: int
    note: str = ""


class Chaos:
    """What scenarios share: a folder, a corpus, an unbroken run, dice."""

    def __init__(self, folder: Path, seed: int, share: float):
        self.folder, self.share, self.rng, self._count = folder, share, random.Random(seed), 0
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        self.corpus: Corpus = runs.open_corpus(folder)
        self.whole = config(folder / "whole")
        self.started = time.monotonic()
        assert self.start(self.whole).wait() == 0, "the unbroken run failed"

    def times(self, full: int) -> int:
        """How often to do what is done so often in full."""
        return max(1, round(full * self.share))

    def start(self, cfg: RunConfig, devices: int = 1, **how: Any) -> Child:
        """A run in a process of its own."""
        return self.fork(lambda say: runs.train(cfg, self.corpus, say, **how), devices)

    def fork(self, work: Callable[[Callable[[str], None]], int], devices: int = 1) -> Child:
        self._count += 1
        return Child(work, self.folder / f"{self._count}.log", devices)

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

        child = self.fork(compare)
        line = child.until(r"\[.*")
        child.wait()
        return out + (json.loads(line[0]) if line else [f"comparison failed, see {child.log}"])

    def finish(self, cfg: RunConfig, **how: Any) -> int:
        return self.start(cfg, **how).wait()


# --- Scenarios


def kill(chaos: Chaos) -> Iterator[Row]:
    """SIGKILL at random instants, every second one inside a save; runs are killed again and again until they end."""
    wanted, kills, lost, same, done = chaos.times(50), 0, 0, 0, 0
    while kills < wanted:
        cfg, done = config(chaos.folder / f"kill{done}"), done + 1
        while True:
            child = chaos.start(cfg)
            before = newest(cfg)
            aim = (before or 0) + chaos.rng.randint(1, 2 * EVERY)
            if kills % 2 and aim < STEPS:
                at = (aim // EVERY + 1) * EVERY
                hit = child.until(rf"(save|sealing) {min(at, STEPS)}$")
                time.sleep(chaos.rng.random() * 0.1)
            else:
                hit = child.until(rf"step {min(aim, STEPS)}$")
                time.sleep(chaos.rng.random() * 0.03)
            if kills >= wanted or not hit:
                break
            child.kill(signal.SIGKILL)
            if child.wait() == -signal.SIGKILL:
                kills += 1
                reached = max((record["step"] for record in story(Path(cfg.folder))), default=0)
                lost = max(lost, reached - (newest(cfg) or 0))
            else:
                break
        while child.wait() != 0:
            child = chaos.start(cfg)
        same += not chaos.differences(cfg)
    held = kills if same == done else 0
    yield Row("SIGKILL, half of them inside saves", kills, held, f"{same} of {done} runs bit-identical to the unbroken "
              f"one; at most {lost} steps done again, saves every {EVERY}")  # fmt: skip


def term(chaos: Chaos) -> Iterator[Row]:
    """SIGTERM in a step, an evaluation, a save, an export and the first compilation."""
    for phase in ("step", "evaluation", "save"):
        times, held, cfg = chaos.times(10), 0, config(chaos.folder / f"term-{phase}")
        for n in range(times):
            child, begun = chaos.start(cfg), newest(cfg) or 0
            every = dict(step=1, evaluation=EVALUATES, save=EVERY)[phase]
            at = (begun // every + 1) * every
            hit = child.until("evaluation" if phase == "evaluation" else rf"{phase} {at}$")
            if not hit:  # it ended: again from the start
                child.wait()
                shutil.rmtree(cfg.folder)
                child, begun = chaos.start(cfg), 0
                child.until("evaluation" if phase == "evaluation" else rf"{phase} {every}$")
            time.sleep(chaos.rng.random() * 0.01)
            child.kill(signal.SIGTERM)
            status, steps = child.wait(), newest(cfg) or 0
            ended = status == 0 and steps == STEPS
            held += ended or (status == 75 and steps > begun and (Path(cfg.folder) / "requeue.json").exists())
            if ended and n + 1 < times:
                shutil.rmtree(cfg.folder)
        while chaos.finish(cfg):
            pass
        same = not chaos.differences(cfg)
        yield Row(f"SIGTERM in {phase}", times, held * same, "checkpoint committed, status 75 and marker; the finished "
                  "run bit-identical")  # fmt: skip
    yield from _term_export(chaos)
    yield from _term_compile(chaos)


def _term_export(chaos: Chaos) -> Iterator[Row]:
    times, held = chaos.times(10), 0
    for n in range(times):
        to = chaos.folder / f"export{n}"

        def work(say: Callable[[str], None], to: Path = to) -> int:
            from launch import cli

            say("export")
            return cli.main(f"export {chaos.whole.folder} --learner student --to {to}".split())

        child = chaos.fork(work)
        child.until("export")
        time.sleep(chaos.rng.random() * 3)
        child.kill(signal.SIGTERM)
        child.wait()
        whole = not to.exists() or (to / "config.json").exists()
        held += whole and not manifest.problems(checkpoint(chaos.whole, STEPS))
    yield Row("SIGTERM in export", times, held, "no half export under its name; the checkpoint stays valid")


def _term_compile(chaos: Chaos) -> Iterator[Row]:
    times, held, cfg = chaos.times(10), 0, config(chaos.folder / "term-compile", 10)
    chaos.finish(config(chaos.folder / "term-compile", 5))
    for _ in range(times):

        def work(say: Callable[[str], None]) -> int:
            import jax

            jax.config.update("jax_enable_compilation_cache", False)
            return runs.train(cfg, chaos.corpus, say)

        child = chaos.fork(work)
        child.until("compile")
        time.sleep(chaos.rng.random() * 0.5)
        since = time.monotonic()
        child.kill(signal.SIGTERM)
        status = child.wait()
        held += status == 75 and newest(cfg) == 5 and time.monotonic() - since < 5
    valid = not manifest.problems(checkpoint(cfg, 5))
    yield Row("SIGTERM in compile", times, held * valid, "ends within 5 s; the newest checkpoint is valid")


def corrupt(chaos: Chaos) -> Iterator[Row]:
    """Damage to files of the newest checkpoint: does it go unseen, and is the one before found?"""
    kinds = dict(flip=_flip, truncate=_truncate, zero=_zero, delete=lambda file, _: file.unlink())
    times, seed = chaos.times(500), chaos.rng.random()

    def work(say: Callable[[str], None]) -> int:
        from training.checkpoint import Checkpoints

        rng, counts = random.Random(seed), {kind: [0, 0, 0] for kind in kinds}
        for n in range(times):
            kind = list(kinds)[n % len(kinds)]
            run = chaos.folder / "corrupt"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(chaos.whole.folder, run)
            files = [f for f in sorted((run / "checkpoints" / str(STEPS)).rglob("*")) if f.is_file()]
            files = [f for f in files if any(f.read_bytes())] if kind != "delete" else files
            kinds[kind](rng.choice(files), rng)
            with Checkpoints(str(run), keep=2) as checkpoints:
                found = checkpoints.newest_good(lambda _: None)
                aside = (run / "checkpoints" / "set-aside" / str(STEPS)).exists()
                counts[kind][0] += 1
                counts[kind][1] += found != STEPS
                counts[kind][2] += found == STEPS - EVERY and aside
        say(json.dumps(counts))
        return 0

    child = chaos.fork(work)
    line = child.until(r"\{.*", timeout=3600)
    child.wait()
    for kind, (done, seen, back) in json.loads(line[0] if line else "{}").items():
        yield Row(f"checkpoint file: {kind}", done, min(seen, back), f"{seen} detected, {done - seen} silent, {back} "
                  "fell back to the checkpoint before and set the damaged one aside")  # fmt: skip


def _flip(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def _truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def _zero(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    filled = [i for i, byte in enumerate(raw) if byte]
    at, size = rng.choice(filled), rng.choice((1, 64, 4096))
    raw[at : at + size] = bytes(len(raw[at : at + size]))
    file.write_bytes(raw)


def disk(chaos: Chaos) -> Iterator[Row]:
    """A small disk that fills up, and one that becomes read-only; both need the right to mount."""
    for name, size in (("full", "3m"), ("read-only", "60m")):
        place = chaos.folder / f"disk-{name}"
        place.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
        ).returncode:
            yield Row(f"disk {name}", 0, 0, "not run: no right to mount")
            continue
        try:
            cfg = config(place / "run")
            child = chaos.start(cfg)
            if name == "read-only":
                child.until(rf"sealed {EVERY}$")
                child.kill(signal.SIGSTOP)
                subprocess.run(["mount", "-o", "remount,ro", place], check=True)
                child.kill(signal.SIGCONT)
            status, error = child.wait(), child.output().splitlines()[-1:]
            kept = newest(cfg)
            valid = kept is not None and not manifest.problems(checkpoint(cfg, kept))
            yield Row(f"disk {name}", 1, int(status == 1 and valid), f"kept step {kept}; said: {' '.join(error)[:160]}")
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def bad_steps(chaos: Chaos) -> Iterator[Row]:
    """NaN gradients once and ten times in a row, and a loss ten times as large."""
    for name, marked, status, rollbacks in (
        ("NaN gradient, once", {"nan": [range(12, 13)]}, 0, 0),
        ("NaN gradients, ten in a row", {"nan": [range(12, 22)]}, 0, 3),
        ("NaN gradients without end", {"nan": [range(12, 10**6)]}, 1, 3),
        ("loss ten times as large, once", {"spike": [range(28, 29)]}, 0, 1),
    ):
        cfg = config(chaos.folder / name.replace(" ", "-").replace(",", ""))
        child = chaos.start(cfg, marked=marked)
        ended, text = child.wait(), child.output()
        went = text.count("going back from step")
        good = newest(cfg) is not None and not manifest.problems(checkpoint(cfg, newest(cfg) or 0))
        noted = len(list((Path(cfg.folder) / "bad_steps").glob("*.json")))
        held = ended == status and went == rollbacks and good and noted > 0
        again = config(chaos.folder / f"{Path(cfg.folder).name}-killed")
        other = chaos.start(again, marked=marked)
        other.until("step 31$" if status == 0 else "step 13$")
        other.kill(signal.SIGKILL)
        other.wait()
        other = chaos.start(again, marked=marked)
        same = other.wait() == ended and story(Path(again.folder)) == story(Path(cfg.folder))
        yield Row(name, 1, int(held and same), f"{went} times back, {noted} bad steps noted with their documents, "
                  f"status {ended}; killed and started again it goes the same way: {same}")  # fmt: skip


def ranks(chaos: Chaos) -> Iterator[Row]:
    """One of four processes is killed, is frozen, or sleeps for ever while its heart beats."""
    whole = config(chaos.folder / "four", 20, MeshConfig(fsdp=4), stuck_after=BOUND)
    assert [child.wait() for child in _four(chaos, whole)] == [0] * 4, "the unbroken run of four processes failed"
    for name, rank in (("killed", 1), ("killed", 0), ("frozen", 2), ("asleep", 3)):
        cfg = config(chaos.folder / f"four-{name}{rank}", 20, MeshConfig(fsdp=4), stuck_after=BOUND)
        children = _four(chaos, cfg, sleeper=rank if name == "asleep" else None)
        children[rank].until("step 12$")
        if name != "asleep":
            children[rank].kill(signal.SIGKILL if name == "killed" else signal.SIGSTOP)
        since = time.monotonic()
        others = [child for i, child in enumerate(children) if i != rank or name == "asleep"]
        statuses = [child.wait(600) for child in others]
        took = time.monotonic() - since
        for child in children:  # as a launcher does with what is left of a job
            child.kill(signal.SIGKILL)
            child.wait()
        again = [child.wait() for child in _four(chaos, cfg)]
        same = story(Path(cfg.folder)) == story(Path(whole.folder))
        held = took < 2 * BOUND + 10 and all(statuses) and again == [0] * 4 and same
        yield Row(f"rank {rank} of 4 {name}", 1, int(held), f"others gone after {took:.0f} s with {statuses}, "
                  f"safety.stuck_after {BOUND}; started again bit-identical: {same}")  # fmt: skip
    yield from _term_four(chaos, whole)


def _term_four(chaos: Chaos, whole: RunConfig) -> Iterator[Row]:
    cfg = config(chaos.folder / "four-term", 20, MeshConfig(fsdp=4), stuck_after=BOUND)
    children = _four(chaos, cfg)
    children[2].until("step 7$")
    children[2].kill(signal.SIGTERM)
    statuses, at = [child.wait() for child in children], newest(cfg)
    again = [child.wait() for child in _four(chaos, cfg)]
    same = story(Path(cfg.folder)) == story(Path(whole.folder)) and again == [0] * 4
    yield Row("SIGTERM to rank 2 of 4", 1, int(statuses == [75] * 4 and same), f"all stopped after step {at} with "
              f"{statuses}; started again bit-identical: {same}")  # fmt: skip


def _four(chaos: Chaos, cfg: RunConfig, sleeper: int | None = None) -> list[Child]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def work(say: Callable[[str], None], rank: int) -> int:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 4, rank, heartbeat_timeout_seconds=BOUND)
        if rank == sleeper:
            from training.reporter import Reporter

            real = Reporter.begin

            def begin(self: Any, pending: Any) -> None:
                real(self, pending)
                if pending.step == 12:
                    time.sleep(10**6)

            Reporter.begin = begin
        return runs.train(cfg, chaos.corpus, say)

    return [chaos.fork(lambda say, rank=rank: work(say, rank)) for rank in range(4)]


def meshes(chaos: Chaos) -> Iterator[Row]:
    """Saved on 4 x 2 devices, gone on with on 2 x 2, 8 x 1 and 1."""
    first = config(chaos.folder / "mesh", 20, MeshConfig(fsdp=4, expert=2))
    half = config(chaos.folder / "mesh", 20, MeshConfig(fsdp=4, expert=2))
    child = chaos.start(first, devices=8)
    child.until(rf"sealed {2 * EVERY}$")
    child.kill(signal.SIGKILL)
    child.wait()
    shutil.copytree(half.folder, chaos.folder / "mesh-half")
    assert chaos.finish(first, devices=8) == 0
    want = story(Path(first.folder))
    for name, devices, mesh in (
        ("2 x 2", 4, MeshConfig(fsdp=2, expert=2)),
        ("8 x 1", 8, MeshConfig(fsdp=8)),
        ("1", 1, MeshConfig(fsdp=1)),
    ):
        cfg = config(chaos.folder / f"mesh-{devices}-{mesh.expert}", 20, mesh)
        shutil.copytree(chaos.folder / "mesh-half", cfg.folder)
        ended, got = chaos.finish(cfg, devices=devices), story(Path(cfg.folder))
        pairs = [(a["student/loss"], b["student/loss"]) for a, b in zip(got, want, strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        tokens = all(a["student/tokens"] == b["student/tokens"] for a, b in zip(got, want, strict=True))
        held = ended == 0 and apart < 1e-5 and tokens
        yield Row(f"saved on 4 x 2, restored on {name}", 1, int(held), f"losses within {apart:.1g} of those on 4 x 2; "
                  f"tokens of every step alike: {tokens}")  # fmt: skip


def lock(chaos: Chaos) -> Iterator[Row]:
    """A second writer, and what saves that were broken off left behind."""
    cfg = config(chaos.folder / "lock")
    child = chaos.start(cfg)
    child.until("step 6$")
    child.kill(signal.SIGSTOP)
    second = chaos.start(cfg)
    refused = second.wait() == 1 and "is being written by process" in second.output()
    child.kill(signal.SIGCONT)
    ended = child.wait() == 0
    yield Row("two writers", 1, int(refused and ended), "the second is refused, the first goes on")
    shutil.rmtree(checkpoint(cfg, STEPS))
    left = Path(cfg.folder) / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp"
    left.mkdir()
    held = chaos.finish(cfg) == 0 and not left.exists() and not chaos.differences(cfg)
    yield Row("leftovers of a broken save", 1, int(held), "removed; the run ends as the unbroken one")


# --- Helpers, the table


def newest(cfg: RunConfig) -> int | None:
    """Step of the newest complete checkpoint."""
    return max(manifest.finished(epath.Path(cfg.folder) / "checkpoints"), default=None)


def checkpoint(cfg: RunConfig, step: int) -> Any:
    return epath.Path(cfg.folder) / "checkpoints" / str(step)


SCENARIOS = dict(kill=kill, term=term, corrupt=corrupt, disk=disk, bad_steps=bad_steps, ranks=ranks, meshes=meshes,
                 lock=lock)  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = ["| what was done | times | held | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.scenario} | {row.injected} | {row.held} | {row.note} |" for row in rows)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"some of {', '.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of how often each is done (1)")
    parser.add_argument("--docs", type=Path, help="a file to write the table into")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(SCENARIOS)):
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), args.seed, args.share)
        for name in names:
            since = time.monotonic()
            for row in SCENARIOS[name](chaos):
                rows.append(row)
                print(f"{'ok  ' if row.held == row.injected else 'LOST'} {row.scenario}: {row.held} of {row.injected}; "
                      f"{row.note}", flush=True)  # fmt: skip
            print(f"     {name} took {time.monotonic() - since:.0f} s", flush=True)
    print(table(rows))
    if args.docs:
        took, command = time.monotonic() - chaos.started, f"python -m tools.chaos {' '.join(sys.argv[1:])}"
        made = f"{time.strftime('%Y-%m-%d')}, `{command}`, {took:.0f} s on {os.cpu_count()} cores"
        before, _, rest = args.docs.read_text().partition(MARK)
        args.docs.write_text(f"{before}{MARK}\n{made}:\n\n{table(rows)}\n{MARK}{rest.partition(MARK)[2]}")
    return int(any(row.held != row.injected for row in rows))


if __name__ == "__main__":
    sys.exit(main())
