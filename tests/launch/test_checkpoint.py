"""`llama4 checkpoint`: what it lists, what it finds damaged, how checkpoints differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support import error, output

from launch import cli
from training.checkpoint import Checkpoints
from training.config import Learner, OptimizerConfig, RunConfig, TrainConfig
from training.record import run_record
from training.state import LearnerState, TrainState


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Checkpoints of steps 1 and 2 of a state with two arrays."""
    from llama4_jax.config import tiny_scout

    monkeypatch.chdir(tmp_path)
    cfg = RunConfig("t", {"scout": Learner(tiny_scout(), OptimizerConfig())}, train=TrainConfig(9), out="run")
    with Checkpoints("run", keep=2) as checkpoints:
        for step in (1, 2):
            params = {"a": jax.numpy.arange(6.0).at[3].add(step), "b": jax.numpy.ones((2, 2))}
            state = TrainState(np.int32(step), {"scout": LearnerState(params, None)})
            checkpoints.save(step, state, {"row": step}, run_record(cfg, "0" * 64))
    return SimpleNamespace(cfg=cfg)


def test_list_verify_and_diff(run, capsys):
    listed = output("checkpoint list run", capsys)
    assert [one["step"] for one in listed["complete"]] == [1, 2] and not listed["set_aside"]
    assert all(len(one["digest"]) == 64 and one["files"] > 3 and one["bytes"] > 100 for one in listed["complete"])
    assert output("checkpoint verify run", capsys)["steps"] == [{"step": s, "problems": []} for s in (1, 2)]
    assert output("checkpoint diff run@2 run@2", capsys)["equal"]

    assert cli.main(["checkpoint", "diff", "run@1", "run@2"]) == 1
    text = capsys.readouterr().out
    assert "data: row: 1 -> 2" in text and "learners.scout.params.a: 1 of 6 entries differ, by" in text
    assert "2 arrays differ, 1 are equal bit by bit" in text  # the step, too

    file = next(f for f in Path("run/checkpoints/2/state").rglob("*") if f.is_file() and f.stat().st_size > 10)
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    assert cli.main(["checkpoint", "verify", "run"]) == 1
    text = capsys.readouterr().out
    assert "run@1: good" in text and f"run@2: {file.relative_to('run/checkpoints/2')} is not what was written" in text
    assert "checkpoint run/checkpoints/2 is damaged" in error("checkpoint diff run@1 run@2", capsys)
    with Checkpoints("run", keep=2) as checkpoints:
        checkpoints.newest_good(lambda _: None)
    (aside,) = output("checkpoint list run", capsys)["set_aside"]
    assert aside["folder"] == "run/checkpoints/set-aside/2" and "is not what was written" in aside["why"]
    assert "no checkpoint of step 2" in error("checkpoint verify run@2", capsys)
    Path("run/checkpoints/1/manifest.json").write_text("{}")
    (damaged,) = output("checkpoint list run", capsys)["incomplete"]
    assert damaged == "run/checkpoints/1 (manifest.json is not what was written)"
    Path("run/checkpoints/1/manifest.json").unlink()
    assert cli.main(["checkpoint", "seal", "run@1"]) == 0 and cli.main(["checkpoint", "verify", "run@1"]) == 0
    assert "has a manifest" in error("checkpoint seal run@1", capsys)
    assert "no checkpoint of step 9" in error("checkpoint seal run@9", capsys)
