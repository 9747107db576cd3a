"""`llama4 bench step` times the step that a run makes, on the shapes it is given, and says how it ran."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import configs
from launch import cli
from llama4_jax.config import tiny_behemoth, tiny_scout
from training import bench
from training.config import Distillation, Learner, RunConfig, TrainConfig
from training.flops import step_per_token

SMALL = dict(vocab_size=96, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=8, expert_dim=16, dense_dim=32,
             num_layers=1, nope_every=1, num_experts=2, chunk=16)  # fmt: skip
OVERRIDES = " ".join(f"--model.{name.replace('_', '-')} {value}" for name, value in SMALL.items())


@pytest.fixture
def co_trained() -> RunConfig:
    """A frozen teacher whose weights lie nowhere, and its student."""
    teacher = Learner(replace(tiny_behemoth(), **SMALL), None, init="run:nowhere", compute_dtype="float32")
    student = Learner(replace(tiny_scout(), **SMALL), distillation=Distillation("teacher"), compute_dtype="float32")
    return RunConfig("small", {"teacher": teacher, "student": student}, train=TrainConfig(batch=8, seq_len=32))


def test_synthetic_rows_are_whole_documents(co_trained):
    batches = bench.synthetic_batches(co_trained, count=2)
    for batch in batches:
        assert all(x.shape == (8, 32) for x in jax.tree.leaves(batch)) and batch.tiles is None
        assert (batch.tokens >= 0).all() and (batch.tokens < 96).all()
        assert (batch.segment_ids == 1).all() and (batch.loss_mask == 1).all() and (batch.domain == 0).all()
        np.testing.assert_array_equal(batch.labels[:, :-1], batch.tokens[:, 1:])
        np.testing.assert_array_equal(batch.positions, np.broadcast_to(np.arange(32), (8, 32)))
    assert len(np.unique(np.concatenate([batch.document_id for batch in batches]))) == 16
    assert not np.array_equal(batches[0].tokens, batches[1].tokens)
    again = bench.synthetic_batches(co_trained, count=1)[0]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again, batches[0])), strict=True))
    other = bench.synthetic_batches(replace(co_trained, train=replace(co_trained.train, seed=1)), count=1)[0]
    assert not np.array_equal(other.tokens, again.tokens)


def test_what_is_reported_is_what_ran(co_trained):
    result = bench.bench_step(co_trained, steps=3, warmup=1)
    seconds, rate = result["step_seconds"], result["tokens_per_second"]
    for spread in (seconds, rate):
        low, high = spread["range"]
        assert 0 < low <= spread["quartiles"][0] <= spread["median"] <= spread["quartiles"][1] <= high
    assert rate["median"] == pytest.approx(8 * 32 / seconds["median"])
    assert result["model_tflops"] * 1e12 == pytest.approx(8 * 32 * step_per_token(co_trained))
    assert result["tflops_per_second_and_device"] * 1e12 == pytest.approx(
        rate["median"] * step_per_token(co_trained) / jax.device_count()
    )
    assert set(result["learners"]) == {"teacher", "student"}
    assert result["learners"]["student"]["runs"]["remat"] == "block"
    assert result["learners"]["student"]["runs"]["attention"] in ("blockwise", "reference")
    weights = sum(of["parameters"] for of in result["learners"].values())
    program = result["memory"]["program"]
    assert program["alias"] <= program["argument"] < 12 * weights + 1e6  # split over the devices
    # The donated state is updated in place: all that is not the state is the metrics.
    assert program["output"] - program["alias"] < 2048
    if jax.default_backend() == "cpu":
        assert result["memory"]["peak_of"] == "process" and result["mfu"] is None
        assert result["memory"]["peak"] > program["temp"]
    assert json.loads(json.dumps(result)) == result


def test_a_diverging_step_has_no_speed(co_trained):
    student = co_trained.learners["student"]
    wild = replace(student, optimizer=replace(student.optimizer, learning_rate=1e30, warmup=0),
                   distillation=Distillation())  # fmt: skip
    with pytest.raises(FloatingPointError, match="student's gradient norm"):
        bench.bench_step(replace(co_trained, learners={"student": wild}), steps=3)


def test_command_takes_any_shape(capsys, tmp_path: Path, monkeypatch):
    """The options reach the configuration, `--batch` and `--seq` as fields of it, and both kinds of output agree."""
    seen = {}

    def timed(cfg, steps, warmup):
        seen.update(cfg=cfg, steps=steps, warmup=warmup)
        spread = dict(median=2.0, quartiles=[1.0, 3.0], range=[0.5, 4.0])
        memory = dict(peak=3 << 30, peak_of="process", program=dict(argument=1 << 20, output=2, alias=3, temp=5 << 20))
        return dict(
            preset=cfg.name, batch=cfg.train.batch, seq_len=cfg.train.seq_len, steps=steps, mesh=dict(fsdp=4),
            tokens_per_second=spread, step_seconds=spread, compile_seconds=dict(trace=1.0, compile=2.0), memory=memory,
            learners=dict(scout=dict(parameters=1000, runs=dict(remat="none"))), model_tflops=1.0, mfu=0.4,
            tflops_per_second_and_device=0.5, device="cpu", jax="0",
        )  # fmt: skip

    monkeypatch.setattr(bench, "bench_step", timed)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    line = f"bench step pretrain:tiny --batch 6 --seq 48 --steps 5 --warmup 2 --remat layer {OVERRIDES}"
    assert cli.main([*line.split(), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    learner = seen["cfg"].learners["scout"]
    assert (seen["cfg"].train.batch, seen["cfg"].train.seq_len, seen["steps"], seen["warmup"]) == (6, 48, 5, 2)
    assert learner.remat == "layer" and all(getattr(learner.model, name) == value for name, value in SMALL.items())
    assert learner.model.rope == configs.find("pretrain:tiny").learners["scout"].model.rope

    assert cli.main([*line.split(), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == printed
    assert "6 rows of 48 tokens, 5 steps on fsdp 4 (cpu)" in out and "MFU 40.0%" in out
    assert "peak 3.00 GiB of the process; the step's arguments 1.0 MiB, temps 5.0 MiB a device" in out
    assert "scout: 1,000 parameters; remat none" in out


def test_distill_sets_the_loss_and_the_step_beside_their_like(co_trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("launch.train.find", lambda _: co_trained)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    file = tmp_path / "out.json"
    assert cli.main(f"bench distill small --loss 2048x96 --steps 2 --json {file}".split()) == 0
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    alone, measured = result["loss"]
    assert (alone["measured"], measured["measured"], alone["width"], alone["teacher_width"]) == (False, True, 32, 32)
    for loss in (alone, measured):  # a chunk of 1,024 tokens at a time, against all 2,048 of them
        assert loss["memory_ratio"] == loss["temporaries"]["fused"] / loss["temporaries"]["naive"] < 1
    seconds = result["step"]["seconds"]
    assert set(seconds) == {"together", "teacher, forward", "student, labels alone"}
    assert all(0 < x["range"][0] <= x["median"] <= x["range"][1] for x in seconds.values())
    ends = [sum(seconds[part]["range"][end] for part in seconds if part != "together") for end in (0, 1)]
    together = seconds["together"]["range"]
    assert together[0] / ends[1] <= 1 + result["step"]["overhead"] <= together[1] / ends[0]
    assert "2048 x 96 with statistics" in out and "together over the sum of the parts" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench", "the following arguments are required: what"),
        ("bench stp pretrain:tiny", "invalid choice: 'stp'"),
        ("bench step", "a preset or a run's folder is needed; the presets are pretrain:tiny"),
        ("bench step pretrain:tyni", "no preset 'pretrain:tyni'; the nearest is 'pretrain:tiny'"),
        ("bench step pretrain:tiny --batch some", "--train.batch is a whole number, not 'some'"),
        ("bench step pretrain:tiny --seq 200", "must be a multiple of scout's chunk (128)"),
        ("bench step pretrain:tiny --steps 0", "takes at least 1 step and 0 of warm-up, not 0 and 3"),
        (
            "bench distill pretrain:tiny",
            "pretrain:tiny has no student: take one with a teacher, such as codistill:tiny",
        ),
        ("bench distill codistill:tiny --loss 4096", "--loss takes TOKENSxVOCABULARY, such as 4096x20480, not '4096'"),
        ("bench distill codistill:tiny --steps 0", "a benchmark takes at least 1 step, not 0"),
        ("bench step pretrain:tiny --jsn", "no option or field --jsn; the nearest is --json"),
        ("bench step pretrain:tiny --json no/where.json", "there is no folder"),
    ],
)
def test_mistakes_take_one_line(line: str, message: str, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err, (out, err)
