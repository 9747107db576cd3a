"""Checkpoints in an object store, without rename or append, in which requests fail now and then."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from object_store import GoogleStore, google

from training import manifest
from training.checkpoint import Checkpoints
from training.mesh import make_mesh
from training.record import run_record
from training.state import abstract_state, create_state

HASH = "0" * 64


@pytest.mark.parametrize("fails", [0.0, 0.05])
def test_checkpoints_in_a_store(make_run, monkeypatch, fails):
    """Written, verified, kept by number, found damaged, set aside; a broken-off save is removed."""
    with google(monkeypatch, fails) as bucket:
        cfg = replace(make_run(), out=f"{bucket}/run")
        mesh = make_mesh(cfg.mesh, jax.devices()[:1])
        state = create_state(cfg, mesh)
        with Checkpoints(cfg.folder, keep=2) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, state._replace(step=np.int32(step)), {"row": step}, run_record(cfg, HASH))
            checkpoints.wait()
            assert checkpoints.steps == [2, 3] and not checkpoints.problems(3)
        folder = epath.Path(cfg.folder) / "checkpoints"
        data = max(manifest.files(folder / "3").values(), key=lambda f: f.stat().length)
        data.write_bytes(data.read_bytes()[:-1] + b"\0")
        (folder / "4" / "state").mkdir(parents=True)
        (folder / "4" / "state" / "part").write_bytes(b"broken off")
        lines = []
        with Checkpoints(cfg.folder, keep=2) as checkpoints:
            assert checkpoints.newest_good(lines.append) == 2
            again, place = checkpoints.restore(2, abstract_state(cfg, mesh))
        assert place == {"row": 2} and int(again.step) == 2
        for ours, theirs in zip(jax.tree.leaves(again.learners), jax.tree.leaves(state.learners), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert sorted(f.name for f in folder.iterdir()) == ["2", "set-aside"] and len(lines) == 1
        assert (folder / "set-aside" / "3" / manifest.FILE).exists()
        assert not [path for path in GoogleStore.store if "orbax-checkpoint-tmp" in path]
