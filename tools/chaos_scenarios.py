"""What `tools.chaos` does to runs, scenario by scenario, and what it makes of them.

Each draws its instants and places from the seed, and gives a `Row` or several.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from tools import chaos_run as runs
from tools.chaos_run import EVERY, STEPS, Chaos, Child, Row, config, story
from training import manifest
from training.config import MeshConfig, RunConfig

BOUND = 15
"""Seconds that safety.stuck_after gives in scenarios with stuck processes."""


def kill(chaos: Chaos) -> Iterator[Row]:
    """SIGKILL at random instants, every second one inside a save; runs are killed again and again until they end."""
    wanted, kills, inside, again, lost, same, done = chaos.times(50), 0, 0, 0, 0, 0, 0
    while kills < wanted:
        cfg, done, status = config(chaos.folder / f"kill{done}"), done + 1, -signal.SIGKILL
        while kills < wanted and status == -signal.SIGKILL:
            child, before = chaos.start(cfg), newest(cfg) or 0
            at = min((before // EVERY + chaos.rng.randint(1, 2)) * EVERY, STEPS)
            if 2 * inside <= kills:
                hit = child.until(f"save {at}$")
                time.sleep(chaos.rng.random() * 0.8 * chaos.save_seconds)
            else:
                hit = child.until(f"step {min(before + chaos.rng.randint(1, 2 * EVERY), STEPS)}$")
                time.sleep(chaos.rng.random() * 0.03)
            if hit:
                child.kill(signal.SIGKILL)
            status = child.wait()
            if status == -signal.SIGKILL:
                kills, begun, kept = kills + 1, max(child.numbers("save"), default=0), newest(cfg) or 0
                inside += begun > kept
                again = max(again, max(child.numbers("step"), default=0) - kept)
                lost = max(lost, max(child.numbers("sealing"), default=0) - kept)  # a save waits for the one before
        same += (status == 0 or chaos.finish(cfg) == 0) and not chaos.differences(cfg)
    held = kills if same == done and lost <= EVERY else 0
    yield Row("SIGKILL at random instants", kills, held, f"{inside} of them inside saves; {same} of {done} runs that "
              f"they broke bit-identical to the unbroken one; of saves every {EVERY} steps at most the one under way "
              f"was lost, at most {again} steps were made again")  # fmt: skip


def term(chaos: Chaos) -> Iterator[Row]:
    """SIGTERM in a step, an evaluation, a save, an export and the first compilation."""
    for phase in ("step", "evaluation", "save"):
        yield _term(chaos, phase)
    yield _term_export(chaos)
    yield _term_compile(chaos)


def _term(chaos: Chaos, phase: str) -> Row:
    times, held, slowest, cfg = chaos.times(10), 0, 0.0, config(chaos.folder / f"term-{phase}")
    told = 0
    while told < times:
        child, begun = chaos.start(cfg), newest(cfg) or 0
        if phase == "evaluation":
            hit = child.until("evaluation")
        else:
            at = begun + chaos.rng.randint(1, 4) if phase == "step" else (begun // EVERY + 1) * EVERY
            hit = child.until(f"{phase} {min(at, STEPS)}$")
        time.sleep(chaos.rng.random() * (chaos.save_seconds if phase == "save" else 0.02))
        since = time.monotonic()
        child.kill(signal.SIGTERM)
        status, kept = child.wait(), newest(cfg) or 0
        if hit and (status == 75 or kept == STEPS):
            told += 1
            slowest = max(slowest, time.monotonic() - since)
            after = child.said[child.said.index("told") :] if "told" in child.said else []
            committed = kept == max([begun, *child.numbers("step")]) and sum(x.startswith("step ") for x in after) <= 1
            marked = status == 75 and (Path(cfg.folder) / "requeue.json").exists()
            held += committed and (marked or kept == STEPS)
        elif status:
            return Row(f"SIGTERM in {phase}", times, 0, f"status {status}: {child.output()[-160:]}")
        if kept == STEPS and told < times:  # again from the start
            shutil.rmtree(cfg.folder)
    same = chaos.finish(cfg) == 0 and not chaos.differences(cfg)
    return Row(f"SIGTERM in {phase}", times, held * same, f"checkpoint of the step under way committed, status 75 and "
               f"marker, within {slowest:.1f} s; the finished run bit-identical: {same}")  # fmt: skip


def _term_export(chaos: Chaos) -> Row:
    times, held, before = chaos.times(10), 0, 0

    def start(to: Path) -> Child:
        def work(say: Callable[[str], None]) -> int:
            from launch import cli

            say("export")
            return cli.main(f"export {chaos.whole.folder} --learner student --to {to}".split())

        child = chaos.fork(work)
        child.until("export")
        return child

    began = time.monotonic()
    assert start(chaos.folder / "export").wait() == 0
    lasts, want = time.monotonic() - began, manifest.files(epath.Path(chaos.folder / "export"))
    digests = {name: manifest.digest(file) for name, file in want.items()}
    for n in range(times):
        to = chaos.folder / f"export{n}"
        child = start(to)
        time.sleep(chaos.rng.random() * lasts)
        child.kill(signal.SIGTERM)
        if child.wait():
            before += 1
            half = to.exists()
            held += not half and start(to).wait() == 0 and not manifest.problems(checkpoint(chaos.whole, STEPS))
        else:
            held += 1
        found = {name: manifest.digest(file) for name, file in manifest.files(epath.Path(to)).items()}
        held -= found != digests
    return Row("SIGTERM in export", times, held, f"{before} before its end: nothing under its name, the checkpoint "
               "valid; started again, all files as of an unbroken export")  # fmt: skip


def _term_compile(chaos: Chaos) -> Row:
    times, held, cfg = chaos.times(10), 0, config(chaos.folder / "term-compile", 2 * EVERY)
    chaos.finish(config(chaos.folder / "term-compile", EVERY))
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
        held += status == 75 and newest(cfg) == EVERY and time.monotonic() - since < 5
    valid = not manifest.problems(checkpoint(cfg, EVERY))
    return Row("SIGTERM in compile", times, held * valid, "ends within 5 s; the newest checkpoint is valid")


def corrupt(chaos: Chaos) -> Iterator[Row]:
    """Damage to files of the newest checkpoint: does it go unseen, and is the one before found?"""
    kinds = dict(flip=_flip, truncate=_truncate, zero=_zero, delete=lambda file, _: file.unlink())
    times, seed, run = chaos.times(500), chaos.rng.random(), chaos.folder / "corrupt"

    def spoil(kind: str, rng: random.Random) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(chaos.whole.folder, run)
        files = [f for f in sorted((run / "checkpoints" / str(STEPS)).rglob("*")) if f.is_file()]
        kinds[kind](rng.choice([f for f in files if kind == "delete" or any(f.read_bytes())]), rng)

    def work(say: Callable[[str], None]) -> int:
        from training.checkpoint import Checkpoints

        rng, counts = random.Random(seed), {kind: [0, 0, 0] for kind in kinds}
        for n in range(times):
            kind = list(kinds)[n % len(kinds)]
            spoil(kind, rng)
            with Checkpoints(str(run), keep=2) as checkpoints:
                found = checkpoints.newest_good(lambda _: None)
            aside = (run / "checkpoints" / "set-aside" / str(STEPS)).exists()
            counts[kind][0] += 1
            counts[kind][1] += found != STEPS
            counts[kind][2] += found == STEPS - EVERY and aside
        say(json.dumps(counts))
        return 0

    counts = json.loads(chaos.answer(work, timeout=3600) or "{}")
    assert counts, "the process that damages files failed"
    for kind, (done, seen, back) in counts.items():
        spoil(kind, chaos.rng)
        cfg = config(run)
        same = chaos.finish(cfg) == 0 and not chaos.differences(cfg)
        yield Row(f"checkpoint file: {kind}", done, min(seen, back) * same, f"{seen} detected, {done - seen} silent, "
                  f"{back} fell back to the checkpoint before and set the damaged one aside; the run that goes on from "
                  f"there bit-identical: {same}")  # fmt: skip


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
    """A small disk that fills up, which needs the right to mount, and a folder that becomes read-only."""
    one = sum(-(-file.stat().length // 4096) for file in manifest.files(checkpoint(chaos.whole, STEPS)).values()) * 4
    place = chaos.folder / "disk-full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={one * 5 // 2}k", "tmpfs", place]  # for two checkpoints and a half
    if subprocess.run(mount, capture_output=True).returncode:
        yield Row("disk full", 0, 0, "not run: no right to mount")
    else:
        try:
            child = chaos.start(cfg := config(place / "run"))
            child.wait()
            yield _ended_by_disk("disk full", cfg, child)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    child = chaos.start(cfg := config(chaos.folder / "read-only"), mortal=True)
    child.until(rf"sealed {EVERY}$")
    kept = Path(cfg.folder, "checkpoints")
    kept.chmod(0o555)
    child.wait()
    yield _ended_by_disk("folder read-only", cfg, child)
    kept.chmod(0o755)
    same = chaos.finish(cfg) == 0 and not chaos.differences(cfg)
    yield Row("folder writable again", 1, int(same), "the run goes on; bit-identical")


def _ended_by_disk(what: str, cfg: RunConfig, child: Child) -> Row:
    kept, more = newest(cfg), max(child.numbers("step"), default=0) - max(child.numbers("save"), default=0)
    error = " ".join(child.output().splitlines()[-1:])
    valid = kept is not None and not manifest.problems(checkpoint(cfg, kept))
    held = child.status == 1 and valid and more < EVERY and error.startswith("OSError: ")
    return Row(what, 1, int(held), f"kept step {kept}; ended {more} steps after the save that failed was begun: "
               f"{error.replace(str(Path(cfg.folder).parent), '')[:160]}")  # fmt: skip


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
    first, half = config(chaos.folder / "mesh", 20, MeshConfig(fsdp=4, expert=2)), chaos.folder / "mesh-half"
    child = chaos.start(first, devices=8)
    child.until(rf"sealed {2 * EVERY}$")
    child.kill(signal.SIGKILL)
    child.wait()
    for later in (x for x in (3 * EVERY, 4 * EVERY) if checkpoint(first, x).exists()):
        checkpoint(first, later).rmtree()
    shutil.copytree(first.folder, half)
    rest = chaos.start(first, devices=8)
    assert rest.wait() == 0, f"the unbroken run failed, see {rest.log}"
    want, rows = story(Path(first.folder)), rows_of(rest)
    for name, devices, mesh in (
        ("2 x 2", 4, MeshConfig(fsdp=2, expert=2)),
        ("8 x 1", 8, MeshConfig(fsdp=8)),
        ("1", 1, MeshConfig(fsdp=1)),
    ):
        cfg = config(chaos.folder / f"mesh-{devices}-{mesh.expert}", 20, mesh)
        shutil.copytree(half, cfg.folder)
        bits = chaos.answer(lambda say, cfg=cfg: _restored(cfg, 2 * EVERY, say), devices)
        child = chaos.start(cfg, devices=devices)
        ended, got = child.wait(), story(Path(cfg.folder))
        pairs = [(a["student/loss"], b["student/loss"]) for a, b in zip(got, want, strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        order = rows_of(child) == rows
        held = ended == 0 and apart < 1e-5 and order and bits.startswith("equal")
        yield Row(f"saved on 4 x 2, restored on {name}", 1, int(held), f"{bits}; later losses within {apart:.1g} of "
                  f"those on 4 x 2 (bound 1e-05); the same {len(rows)} batches in the same order: {order}")  # fmt: skip


def rows_of(child: Child) -> list[str]:
    """Digests of the batches that a run read, in their order."""
    return [line for line in child.said if line.startswith("rows ")]


def _restored(cfg: RunConfig, step: int, say: Callable[[str], None]) -> int:
    """Is what a mesh restores, sharded as it trains, what one device reads of the same checkpoint?"""
    import jax
    import numpy as np

    from training.checkpoint import Checkpoints, named_leaves
    from training.mesh import make_mesh
    from training.state import abstract_state

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with Checkpoints(cfg.folder) as checkpoints:
        state = checkpoints.restore(step, abstract_state(cfg, make_mesh(cfg.mesh)))[0]
        shapes = checkpoints.shapes(step)
        alone = {n: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=here) for n, x in shapes.items()}
        stored = checkpoints.arrays(step, alone)
    leaves = {name: np.asarray(getattr(x, "get_value", lambda x=x: x)()) for name, x in named_leaves(state).items()}
    wrong = [name for name in stored if leaves[name].tobytes() != np.asarray(stored[name]).tobytes()]
    say(f"{', '.join(wrong[:3])} differ" if wrong else f"equal bits in all {len(stored)} arrays")
    return 0


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


# --- Helpers


def newest(cfg: RunConfig) -> int | None:
    """Step of the newest complete checkpoint."""
    return max(manifest.finished(epath.Path(cfg.folder) / "checkpoints"), default=None)


def checkpoint(cfg: RunConfig, step: int) -> Any:
    return epath.Path(cfg.folder) / "checkpoints" / str(step)


SCENARIOS = dict(kill=kill, term=term, corrupt=corrupt, disk=disk, bad_steps=bad_steps, ranks=ranks, meshes=meshes,
                 lock=lock)  # fmt: skip
