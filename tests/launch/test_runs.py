"""Commands on a run: train, go on, export, verify, import, and the demonstration of all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import error, output

import configs
from launch import cli, export, verify
from training import lock, quantised
from training.config import RunConfig

REDRAWN = ("report.html", "samples.json", "artifacts.json", lock.FILE)

TINY = (
    "--data.vocab-size 320 --data.heldout 0.2 --train.batch 8 --train.seq-len 32 --train.eval-batches 1 "
    "--train.checkpoint-every 2 --model.chunk 16 --model.embed-dim 32 --model.head-dim 8 --model.num-heads 2 "
    "--model.num-kv-heads 1 --model.expert-dim 16 --model.dense-dim 16 --model.num-experts 2"
)


@pytest.fixture
def train(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that starts a run of two steps in `run`."""
    monkeypatch.chdir(corpus.parent)
    return f"train pretrain:tiny --out run --data.sources text={corpus} {TINY} --train.steps 2"


def test_what_is_not_installed_is_not_tried_again(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """In a job, the folder says that the next start would miss it, too."""
    monkeypatch.setenv("LLAMA4_PROCESSES", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    assert "wandb is not installed" in error(f"train pretrain:tiny --out {run} --track wandb", capsys)
    assert cli.main(["status", str(run), "--restart"]) == 1
    assert "it would fail again: wandb is not installed" in capsys.readouterr().out


def test_train_go_on_export_import(train: str, capsys):
    summary = output(train, capsys)
    assert summary["complete"] and summary["step"] == 2 and summary["folder"] == "run"
    assert {"eval/ce", "eval/ce/long", "eval/ce/short"} <= summary["metrics"].keys()

    # The folder names the run; its configuration is the one that was given on the command line.
    more = output("train run --train.steps 4", capsys)
    assert more["step"] == 4 and more["metrics"]["eval/ce"] != summary["metrics"]["eval/ce"]
    assert "trained with learners.scout.model.attn_scale" in error("train run --model.attn-scale 0.2", capsys)

    made = output("export run --to hf --dtype float32 --step 2", capsys)
    assert made == {"folder": "hf", "run": "run", "learner": "scout", "step": 2, "dtype": "float32"}
    result = output("verify hf --against numpy", capsys)
    assert result["ok"] and result["files"]["ok"] and result["source"]["compared"], result
    manifest = Path("hf/llama4_manifest.json")
    text = manifest.read_text()
    recorded = json.loads(text)["source"]["manifest_sha256"]
    manifest.write_text(text.replace(recorded, "0" * 64))
    assert cli.main(["verify", "hf", "--against", "nothing"]) == 1
    assert "NOT the source: run@2 is not the checkpoint that was exported" in capsys.readouterr().out
    manifest.write_text(json.dumps(dict(json.loads(text), sha256=None)))
    assert "has no digests of tensors" in error("verify hf --against nothing", capsys)
    manifest.write_text(text)
    assert output("diff run@2 hf", capsys)["equal"]
    assert cli.main(["diff", "run@2", "run@4"]) == 1 and "the first that is not" in capsys.readouterr().out
    prompts = ["--prompt", "a", "--prompt", "bc", "--max-new-tokens", "4", "--temperature", "0", "--json"]
    texts = [(cli.main(["generate", place, *prompts]), capsys.readouterr().out) for place in ("run@2", "hf")]
    assert texts[0] == texts[1] and texts[0][0] == 0 and len(texts[0][1].splitlines()) == 2
    assert "a prompt is needed" in error("generate hf", capsys)
    assert "--chat needs Llama 4's tokenizer" in error("generate hf --chat --prompt a", capsys)
    assert "nowhere is neither a run's folder" in error("generate nowhere --prompt a", capsys)
    assert "exists already" in error("export run --to hf", capsys)
    assert "no learner 'scuot'" in error("export run --to other --learner scuot", capsys)
    assert "no checkpoint of step 3" in error("export run --to other --step 3", capsys)

    # Imported and exported again, the weights are the same bytes.
    made = output(f"import hf --to imported {data(train)}", capsys)
    assert made == {"folder": "imported", "source": "hf", "learner": "scout", "step": 0}
    assert "exists already" in error(f"import hf --to imported {data(train)}", capsys)
    output("export imported --to again --dtype float32", capsys)
    name = "model-00001-of-00001.safetensors"
    assert Path("again", name).read_bytes() == Path("hf", name).read_bytes()


def test_from_another_run(train: str, capsys):
    """With nothing changed it goes on as its source did; a mistake names what there is."""
    source = output(train.replace("--train.steps 2", "--train.steps 4"), capsys)
    forked = output("train --from run@2 --out forked", capsys)  # as the run was
    assert forked["metrics"]["loss"] == source["metrics"]["loss"] and forked["metrics"]["step"] == 4
    assert output("train forked", capsys)["complete"]
    longer = output(f"{train.replace('--out run', '--out longer')} --from run --train.steps 5", capsys)
    assert longer["step"] == 5 and json.loads(Path("longer/config.json").read_text())["fork"] == "run@4"

    assert "no checkpoint of step 3 in run/checkpoints; there are: [2, 4]" in error(
        "train --from run@3 --out x", capsys
    )
    assert "no checkpoints in rum; the nearest run is run" in error("train --from rum@2 --out x", capsys)
    assert "begins another run: give its folder, --out DIR" in error("train --from run@2", capsys)
    assert "was trained with fork = 'run@2', not 'run@4'" in error("train --from run@4 --out forked", capsys)
    assert "run@4 is at or behind the end" in error("train --from run --out x", capsys)
    wide = error("train --from run@2 --out x --model.embed-dim 64", capsys)
    assert "run@2 holds other arrays" in wide and "learners.scout.model.embed_dim: 32 -> 64" in wide
    assert not Path("x").exists()


@pytest.mark.slow
def test_the_whole_way_in_one_command(train: str, capsys):
    """A folder in, trained on at a longer sequence with a teacher, and out again, verified; run again, nothing more."""
    output(train, capsys)
    output("export run --to scout --dtype float32", capsys)
    output(f"{train.replace('--out run', '--out other')} --model.moe-every 2 --train.seed 3", capsys)
    output("export other --to maverick", capsys)
    longer = data(train).replace("--train.seq-len 32", "--train.seq-len 64")
    line = f"continue scout --teacher maverick --to longer --against numpy {longer} --train.eval-batches 1"
    made = output(line, capsys)
    assert made["ok"] and made["verify"]["ok"] and made["run"]["step"] == 2
    assert made["verify"]["source"]["text"].startswith("equal to longer/run@2")
    card = Path("longer/hf/README.md").read_text()
    assert "Built with Llama" in card and "| teacher |" in card and "hf:maverick" in card
    assert output(line, capsys) | {"run": 0} == made | {"run": 0}
    # Trained further, the earlier export is set aside.
    more = output(f"{line} --train.steps 3", capsys)
    assert more["ok"] and more["verify"]["source"]["text"].startswith("equal to longer/run@3")
    assert [path.name[:10] for path in Path("longer").iterdir() if path.name not in ("run", "hf")] == ["hf-before-"]


def data(train: str) -> str:
    return f"--data.sources {train.split()[5]} --data.heldout 0.2 --train.batch 8 --train.seq-len 32 --train.steps 2"


def test_a_routers_bias_keeps_from_exporting_until_the_end(train: str, capsys):
    """Refused at a step where it is not 0 yet; what the last step leaves goes out."""
    small = "--model.num-layers 2 --model.nope-every 2"
    biased = train.replace("--train.steps 2", f"{small} --train.steps 4 --model.router-bias true --optimizer.decay 0.5")
    output(biased, capsys)
    assert "error: export: the router's bias is not 0 in" in error("export run --to hf --step 2", capsys)
    assert not Path("hf").exists()
    output("export run --to hf --dtype float32", capsys)
    assert not {"router_bias", "bias_E"} & json.loads(Path("hf/config.json").read_text()).keys()
    plain = train.replace("--out run", f"--out other {small} --init run:run")
    assert "run:run has router_bias = True, but scout's model has False" in error(plain, capsys)
    assert "the nearest that leaves one is 0.5" in error(f"{biased} --optimizer.decay 0 --train.steps 2", capsys)


def test_the_schemes_offered_are_those_there_are():
    assert tuple(quantised.SCHEMES) == export.QUANTISED


@pytest.mark.parametrize(("relative", "ok"), [(0.4, True), (1.0, False), (float("nan"), False)])
def test_a_quantised_weight_may_not_be_off_by_its_largest(monkeypatch, relative, ok):
    from training import diff, weights

    monkeypatch.setattr(weights, "FolderWeights", lambda folder: folder)
    monkeypatch.setattr(weights, "RunWeights", lambda *where: SimpleNamespace(where="run@2"))
    one = diff.Difference("attention.wq_DNH", 0, relative, relative, equal=False)
    monkeypatch.setattr(diff, "compare", lambda a, b, rounded: iter([one]))
    result = verify.compare_source("hf", {"quantisation": "int8", "dtype": "bfloat16"}, "run")
    assert result["ok"] == ok and ("NOT EQUAL" in result["text"]) != ok


def test_verify_has_the_status_of_its_verdict(monkeypatch, capsys):
    from training import verify as module

    def verify(folder: str, tolerance: float, tokens: int | None, *, against: str, seed: int, say) -> object:
        return module.Verification(against, 1e-6, 0.1, tolerance, "float32", 64, 4)

    monkeypatch.setattr(module, "verify", verify)
    monkeypatch.setattr(module, "check_files", lambda folder: module.Files(3, 10, False, (), {}))
    result = output("verify hf", capsys)
    assert result["ok"] and result["max_relative_error"] == 1e-6 and result["text"].startswith("equal")
    assert cli.main(["verify", "hf", "--tolerance", "1e-7"]) == 1
    assert "hf: NOT EQUAL to transformers" in capsys.readouterr().out


@pytest.mark.slow
def test_training_goes_on_from_an_import(train: str, capsys):
    output(train, capsys)
    output("export run --to hf --dtype float32", capsys)
    output(f"import hf --to imported {data(train)} --train.eval-batches 1", capsys)
    imported = output("train imported", capsys)
    first, fresh = (json.loads(Path(f"{run}/metrics.jsonl").read_text().splitlines()[0]) for run in ("imported", "run"))
    assert imported["step"] == 2 and first["loss"] < fresh["loss"]
    # --init imports and trains in one, and comes to the same.
    started = output(f"{train.replace('--out run', '--out init')} --init hf:hf", capsys)
    assert started["metrics"]["loss"] == imported["metrics"]["loss"]
    assert "embed_dim" in error(f"{train.replace('--out run', '--out wide')} --init hf:hf --model.embed-dim 64", capsys)


def test_wrong_beginnings(train: str, capsys):
    assert "no tokenizer at nowhere" in error(f"{train} --data.tokenizer nowhere", capsys)
    assert "nowhere/config.json is missing" in error(f"{train} --init hf:nowhere", capsys)
    assert "init must be empty, hf:DIR, run:DIR or shared:DIR, not 'nowhere'" in error(
        f"{train} --init nowhere", capsys
    )


def shrunken(preset: str) -> RunConfig:
    """The demonstration's run with models small enough for a test."""
    cfg = configs.find(preset)
    sizes = dict(chunk=16, head_dim=8, num_heads=2, num_kv_heads=1, num_experts=2, num_layers=2, nope_every=2)
    learners = {
        name: replace(learner, model=replace(learner.model, **sizes, embed_dim=learner.model.embed_dim // 4,
                                             expert_dim=16, dense_dim=16))
        for name, learner in cfg.learners.items()
    }  # fmt: skip
    return replace(cfg, learners=learners)


def test_demo_goes_on_and_does_nothing_twice(train: str, capsys, monkeypatch):
    for preset in ("pretrain:tiny_behemoth_images", "codistill:tiny_images", "pretrain:tiny_images"):
        monkeypatch.setitem(configs.PRESETS, preset, partial(replace, shrunken(preset)))
    options = train[train.index("--data.sources") : train.index(" --model.chunk")]
    line = f"demo --out demo {options} --train.steps 2"
    first = output(line, capsys)
    assert first["naming"] == {}  # its documents have no digits
    for student in ("maverick", "scout"):
        exported = Path(first["export"][student]["folder"])
        assert (exported / "config.json").exists() and (exported / "tokenizer.model").exists()
        assert first["verify"][student]["ok"]
    assert [text["learner"] for text in first["samples"]["codistill"]] == ["scout"] * 4 + ["maverick"] * 4
    page = Path(first["report"]).read_text()
    assert all(name in page for name in ("behemoth", "maverick", "scout", "demo/hf-scout"))
    Path(first["report"]).unlink()
    # The report is drawn from the runs each time; nothing else is made twice.
    kept = [path for path in Path("demo").rglob("*") if path.is_file() and path.name not in REDRAWN]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert output(line, capsys) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == before and Path(first["report"]).exists()
    assert "demo takes fields of train, data and mesh, not --model.chunk" in error(f"{line} --model.chunk 8", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_has_its_status(train: str, number: signal.Signals, capsys):
    """The process ends by 75 or 130, and the same command goes on after the step that was saved."""
    words = [*train.replace("--train.steps 2", "--train.steps 100000").split(), "--train.checkpoint-every", "100000"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *words], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    time.sleep(0.1)
    process.send_signal(number)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == (75 if number == signal.SIGTERM else 130), rest
    assert Path("run/requeue.json").exists() == (number == signal.SIGTERM)
    steps = sorted(int(path.name) for path in Path("run/checkpoints").iterdir() if path.name.isdecimal())
    assert len(steps) == 1 and steps[0] >= 10
    assert output(f"train run --train.steps {steps[0] + 1}", capsys)["step"] == steps[0] + 1
