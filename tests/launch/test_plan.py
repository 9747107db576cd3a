"""`llama4 plan` at the command line: mistakes take a line that says the nearest thing that works, JSON holds it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import cli
from training import ahead, plan

TINY = "pretrain:tiny --topology v5p:2x2x1"


@pytest.fixture(autouse=True)
def no_platform(monkeypatch):
    monkeypatch.setattr(ahead, "no_device_needed", lambda: None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan", "the following arguments are required: --topology"),
        ("plan --topology v5p:2x2x1", "a preset or a run's folder is needed; the presets are pretrain:tiny"),
        ("plan pretrain:tyni --topology v5p:2x2x1", "no preset 'pretrain:tyni'; the nearest is 'pretrain:tiny'"),
        ("plan pretrain:tiny", "the following arguments are required: --topology"),
        ("plan pretrain:tiny tiny --topology v5p:2x2x1", "one preset, not pretrain:tiny tiny"),
        ("plan pretrain:tiny --topology v5q:2x2x1 --fast", "no devices 'v5q:2x2x1'; the nearest are 'v5p:2x2x1'"),
        ("plan pretrain:tiny --topology v5p:8x8 --fast", "no devices 'v5p:8x8'; the nearest are 'v5p:8x8x4'"),
        ("plan pretrain:tiny --topology h100:4 --fast", "no devices 'h100:4'; the nearest are 'h100:4x8'"),
        (f"plan {TINY} --fast --mesh.expert 3", "are 4: the nearest that suits has mesh.expert 4"),
        (f"plan {TINY} --fast --mesh.fsdp 8", "are 4: the nearest that suits has mesh.fsdp 4"),
        (f"plan {TINY} --fast --mesh.context 4 --train.seq-len 126", "a multiple of mesh.context (4): the nearest"),
        (f"plan {TINY} --fast --train.batch 6", "train.batch (6) must be a multiple of replica x fsdp x expert x"),
        (f"plan {TINY} --fast --model.num-heads 6 --model.num-kv-heads 2 --mesh.tensor 4", "nearest that"),
        (f"plan {TINY} --fst", "no option or field --fst; the nearest is --fast"),
        (f"plan {TINY} --fast --search", "argument --search: not allowed with argument --fast"),
        (f"plan {TINY} --no-compile", "--no-compile goes with --search"),
        (f"plan {TINY} --fast --json no/where.json", "there is no folder"),
        (f"plan {TINY} --fast --mfu 0.5", "--mfu goes with plan distill pretrain:tiny"),
        (f"plan distill {TINY}", "plan distill takes a run with one teacher, and pretrain:tiny has none"),
        (f"plan distill {TINY} --fast", "plan distill compiles nothing"),
        ("plan distill codistill:tiny --topology v5p:2x2x1 --mfu 2", "--mfu must be above 0, at most 1, not 2"),
        (f"plan {TINY} --fast --weights int8", "--weights goes with plan serve pretrain:tiny"),
        (f"plan serve {TINY} --fast", "plan serve compiles nothing"),
        (f"plan serve {TINY} --context 8192", "scout reads at most 4,096 tokens, not --context 8192"),
        (f"plan serve {TINY} --serve-batch 0", "serving: batch must be at least 1, not 0"),
        (f"plan serve {TINY} --weights int4-g128 --model.expert-dim 192", "needs rows of a multiple of 128 weights"),
        ("plan serve codistill:tiny --topology h100:1x8", "has several learners, name one of behemoth"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line(line: str, message: str, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err, (out, err)


def test_serving_is_planned(capsys, tmp_path: Path):
    line = "plan serve pretrain:scout_8k --topology h100:1x1 --weights int4-g32 --context 131072 --context 1048576"
    file = tmp_path / "serve.json"
    assert cli.main([*line.split(), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "one device; 1 sequence, weights in int4-g32" in out and "longest context that fits: " in out
    assert [one["fits"] for one in json.loads(file.read_text())["needs"]] == [True, False]
    assert [("DOES NOT FIT" in row) for row in out.splitlines()[3:5]] == [False, True]


def test_a_plan_is_printed_and_written(capsys, tmp_path: Path):
    file = tmp_path / "plan.json"
    assert cli.main(f"plan {TINY} --fast --json {file}".split()) == 0
    out, err = capsys.readouterr()
    assert "on v5p:2x2x1: 4 devices, fsdp 4" in out and "fits: " in out and "MFU" in out
    assert str(file) in err
    made = json.loads(file.read_text())
    assert cli.main(["plan", *TINY.split(), "--fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert {"preset", "topology", "mesh", "memory", "flops", "traffic", "roofline", "run"} <= set(made)
    assert "compiled" not in made
    memory = made["memory"]
    state = sum(sum(parts.values()) for parts in memory["state"].values())
    assert 0 < state < memory["arguments"] < memory["peak"] < memory["hbm"] and memory["fits"]
    assert made["run"]["tokens"] == made["run"]["steps"] * made["batch"] * made["seq_len"]
    assert made["flops"]["once"] > 0 and made["roofline"]["assumed"]["bf16"] == 459e12


@pytest.fixture
def uncompiled(monkeypatch):
    """Formulas in place of compilers; of the candidates with the attention saved none compiles."""
    real = plan.plan

    def made(cfg, topology, fast=False, log=print):
        if not fast and cfg.learners["scout"].remat == "attention":
            raise NotImplementedError("no such kernel")
        return real(cfg, topology, fast=True)

    monkeypatch.setattr(plan, "plan", made)
    monkeypatch.setattr(ahead, "check_compiler", lambda topology: None)


def test_a_search_says_what_to_take_and_why(capsys, tmp_path: Path, uncompiled):
    file = tmp_path / "search.json"
    assert cli.main(f"plan {TINY} --search --remat nested --json {file}".split()) == 0
    out, _ = capsys.readouterr()
    made = json.loads(file.read_text())
    lines = out.splitlines()
    assert lines[0] == f"{len(made['ranked'])} ways fit; the fastest by their roofline (formulas):"
    best = min(made["compiled"], key=lambda one: one["roofline"]["step"], default=None)
    if best is None:
        assert out.count("does not compile: no such kernel") == 3 and "none of those compiled fits" in out
    else:
        assert f"take: llama4 train pretrain:tiny {best['options']}" in lines
        assert "seconds a step, at least: " in out and "(as it is, by formula: " in out
    steps = [one["step"] for one in made["ranked"]]
    assert steps == sorted(steps, key=lambda step: round(step, 3))
    assert all("--mesh.fsdp" not in one["options"] for one in made["ranked"])  # what is left goes there anyhow


def test_a_teachers_places_are_printed_and_written(capsys, tmp_path: Path):
    file = tmp_path / "plan.json"
    line = "plan distill codistill:tiny --topology v5p:2x2x1 --mfu 0.3 --chip-hour 1 --tb-month 5 --runs 4"
    assert cli.main(f"{line} --json {file}".split()) == 0
    out, _ = capsys.readouterr()
    for words in ("behemoth teaches maverick and scout", "30% MFU of 459 TFLOP/s a chip, 1 a chip-hour, 5 a TB",
                  "as it is not here", "top-64", "4 runs pay up to"):  # fmt: skip
        assert words in out, out
    made = json.loads(file.read_text())
    assert list(made["placements"]) == ["tap", "frozen", "slice", "recorded"]
    assert made["assumed"]["mfu"] == 0.3 and made["runs"] == 4
    assert [form["bytes"] for form in made["formats"].values()] == [220, 152, 36]
