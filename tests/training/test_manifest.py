"""A checkpoint's files: no change goes unseen, the newest good one is found, and damaged ones are set aside."""

from __future__ import annotations

import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from training import manifest
from training.checkpoint import Checkpoints, Damaged, restore_params
from training.mesh import make_mesh
from training.record import run_record
from training.state import abstract_state, create_state

HASH = "0" * 64


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    rng, folder = random.Random(0), epath.Path(tmp_path / "f")
    for name, size in (("a", 1000), ("deep/b", 0), ("deep/er/c", 5_000_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(size))
    manifest.write(folder)
    return folder


def test_what_was_written_is_good(folder):
    assert manifest.problems(folder) == []
    assert {name: size for name, (size, _) in manifest.read(folder).items()} == {"a": 1000, "deep/b": 0,
                                                                               "deep/er/c": 5_000_000}  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_every_change_is_seen(folder, seed):
    """A flipped bit anywhere (the manifest included), a file cut short, gone, emptied, grown or added."""
    rng = random.Random(seed)
    file = rng.choice([folder / name for name in ("a", "deep/er/c", manifest.FILE)])
    raw = bytearray(file.read_bytes())
    how = rng.choice(["flip"] * 4 + ["cut", "gone", "grown", "added", "swapped"])
    if how == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[rng.randrange(len(raw)) :]
    elif how == "swapped":
        raw[:2] = bytes([raw[1], raw[0]]) if raw[0] != raw[1] else b"\1\2"
    file.write_bytes(raw + b"\0" if how == "grown" else raw)
    if how == "gone":
        file.unlink()
    if how == "added":
        (folder / "deep/new").write_bytes(b"")
    assert manifest.problems(folder), how


def test_processes_share_the_work(folder):
    """Each of three hashes a third; together they see all, and the manifest is that of one process."""
    from concurrent.futures import ThreadPoolExecutor

    alone = (folder / manifest.FILE).read_text()
    (folder / manifest.FILE).unlink()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: manifest.write(folder, i, 3), range(3)))
    assert (folder / manifest.FILE).read_text() == alone and len(list(folder.iterdir())) == 3
    (folder / "a").write_bytes(b"x" * 1000)
    assert sum(bool(manifest.problems(folder, i, 3)) for i in range(3)) == 1


def test_a_process_does_not_wait_for_ever(folder, monkeypatch):
    monkeypatch.setattr(manifest, "PATIENCE", 0.2)
    (folder / manifest.FILE).unlink()
    with pytest.raises(TimeoutError, match=r"manifest.json.1 did not come within"):
        manifest.write(folder, 0, 2)


def test_a_share_that_is_still_being_written_is_waited_for(folder):
    """A file is there before its content is, where writing is no single act."""
    from concurrent.futures import ThreadPoolExecutor

    alone, other = (folder / manifest.FILE).read_text(), folder / f"{manifest.FILE}.1"
    (folder / manifest.FILE).unlink()
    other.write_text("")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(manifest.write, folder, 0, 2)
        other.write_text('{"deep/b": [0,')
        with pytest.raises(TimeoutError):
            first.result(0.3)
        pool.submit(manifest.write, folder, 1, 2).result()
        first.result()
    assert (folder / manifest.FILE).read_text() == alone


def test_a_hiccup_is_tried_again_and_a_full_disk_is_not():
    calls = []

    def do(number: int, times: int):
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, "no")
        return len(calls)

    assert manifest.persist(lambda: do(5, 2), pause=0.0) == 3
    calls.clear()
    with pytest.raises(OSError, match="no"):
        manifest.persist(lambda: do(28, 1), pause=0.0)
    assert len(calls) == 1


@pytest.fixture
def three(make_run):
    """Checkpoints of steps 1, 2 and 3, which differ."""
    cfg = make_run()
    state = create_state(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    with Checkpoints(cfg.folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state._replace(step=np.int32(step)), {"row": step}, run_record(cfg, HASH))
    return cfg


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_found(three):
    folder, lines = Path(three.folder) / "checkpoints", []
    victim = max((f for f in (folder / "3").rglob("*") if f.is_file()), key=os.path.getsize)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    victim.write_bytes(raw)
    (folder / "2" / manifest.FILE).unlink()
    (folder / "7.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(Damaged, match=r"checkpoints/3 is damaged: state/.* is not what was written; other .*: 1"):
        restore_params(three.folder)
    like = abstract_state(three, make_mesh(three.mesh, jax.devices()[:1]))
    with Checkpoints(three.folder, keep=2) as checkpoints:
        assert checkpoints.newest_good(lines.append) == 1
        state, place = checkpoints.restore(1, like)
        assert int(state.step) == 1 and place == {"row": 1}
        assert checkpoints.steps == [1]
    assert sorted(f.name for f in folder.iterdir()) == ["1", "set-aside"]
    assert victim.name in [f.name for f in (folder / "set-aside" / "3").rglob("*")], "nothing is deleted"
    assert len(lines) == 2 and "2 is not used: manifest.json is missing" in lines[0] and "3 is not used" in lines[1]
    assert "is not what was written" in (folder / "set-aside" / "3.txt").read_text()


def test_what_is_kept(make_run):
    cfg = make_run()
    state = create_state(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    with Checkpoints(cfg.folder, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {}, run_record(cfg, HASH))
            checkpoints.wait()
            assert step in checkpoints.steps
        assert checkpoints.steps == [4, 6, 7]


def test_what_is_small_is_read_without_the_rest(three):
    """Configuration and place are compared with their own digests; the arrays beside them are not looked at."""
    folder = Path(three.folder) / "checkpoints" / "3"
    victim = max((f for f in (folder / "state").rglob("*") if f.is_file()), key=os.path.getsize)
    victim.write_bytes(b"")
    with Checkpoints(three.folder) as checkpoints:
        assert checkpoints.place(3) == {"row": 3} and checkpoints.config(3) == three
        with pytest.raises(Damaged, match=r"3 is damaged: state/.* has 0 bytes of \d+"):
            checkpoints.shapes(3)
    victim = folder / "data" / "metadata"
    victim.write_text(victim.read_text().replace("3", "4"))
    with Checkpoints(three.folder) as checkpoints:
        assert checkpoints.config(3) == three
        with pytest.raises(Damaged, match=r"3 is damaged: data/metadata is not what was written; other .*: 1, 2"):
            checkpoints.place(3)


def test_an_old_checkpoint_that_cannot_be_deleted_is_what_is_spoken_of(three, monkeypatch):
    """The new one is there."""
    real = manifest.persist

    def fails(do, *how):
        if getattr(do, "func", None) and do.func.__name__ == "rmtree":
            raise PermissionError(13, "Permission denied")
        return real(do, *how)

    state = create_state(three, make_mesh(three.mesh, jax.devices()[:1]))
    with Checkpoints(three.folder, keep=3) as checkpoints:
        monkeypatch.setattr(manifest, "persist", fails)
        checkpoints.save(4, state, {}, run_record(three, HASH))
        with pytest.raises(OSError, match=r"step 4 was written, but .*points/1, .* not be deleted: Permission"):
            checkpoints.wait()
        assert checkpoints.latest == 4


def test_a_save_that_failed_is_never_restored_and_the_next_one_works(three, monkeypatch):
    """The manifest cannot be written once: the error surfaces, the step does not count, later saves do."""
    real = manifest.write

    def fails(*_):
        raise OSError(28, "No space left on device")

    state = create_state(three, make_mesh(three.mesh, jax.devices()[:1]))
    with Checkpoints(three.folder, keep=3) as checkpoints:
        monkeypatch.setattr(manifest, "write", fails)
        checkpoints.save(4, state, {}, run_record(three, HASH))
        with pytest.raises(OSError, match=r"the checkpoint of step 4 in .* was not written: .*No space left"):
            checkpoints.wait()
        assert checkpoints.latest == 3
        monkeypatch.setattr(manifest, "write", real)
        checkpoints.save(5, state, {}, run_record(three, HASH))
        checkpoints.wait()
        assert checkpoints.latest == 5
