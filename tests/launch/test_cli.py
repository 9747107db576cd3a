"""What a user sees: one line for every mistake, the status it deserves, help that answers at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, overrides

HEAVY = ("jax", "numpy", "flax", "orbax", "grain", "torch", "rich", "sentencepiece")


def failure(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that fails with status 2."""
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 1, (out, err)
    assert lines[0].startswith("llama4: error: ")
    return lines[0].removeprefix("llama4: error: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "",
            "a command is needed: demo, train, launch, status, board, targets, checkpoint, export, import, verify",
        ),
        ("trian pretrain:tiny", "no command 'trian'; the nearest is 'train'"),
        ("train", "a preset or a run's folder is needed; the presets are pretrain:tiny"),
        ("train pretrain:tyni", "no preset 'pretrain:tyni'; the nearest is 'pretrain:tiny'"),
        ("data inspect pretrain:tyni", "no preset 'pretrain:tyni'; the nearest is 'pretrain:tiny'"),
        ("data", "llama4 data"),
        ("data ledger nowhere", "data ledger nowhere: no checkpoints in nowhere"),
        ("train pretrain:tiny --train.stepz 3", "no option or field --train.stepz; the nearest is --train.steps"),
        ("train pretrain:tiny --train.steps many", "--train.steps is a whole number, not 'many'"),
        ("train pretrain:tiny --train.steps 0", "train.steps must be at least 1, not 0"),
        ("train pretrain:tiny --stages.0.batch 4", "no field --stages.0.batch: pretrain:tiny has no stages"),
        ("train pretrain:tiny_long --stages.1.batch 4", "the nearest is --stages.0.batch; stages, and a mesh"),
        (
            "train pretrain:tiny_long --stages.0.bach 4",
            "no option or field --stages.0.bach; the nearest is --stages.0.batch",
        ),
        (
            "train pretrain:tiny_long --train.steps 50",
            "a stage begins after step 100, which must be less than train.steps (50)",
        ),
        ("train pretrain:tiny_long --stages.0.seq-len 1000", "after step 100: train.seq_len (1000) must be a multiple"),
        ("train pretrain:tiny --from nowhere@3 --out new", "--from nowhere@3: no checkpoints in nowhere"),
        ("train pretrain:tiny --from nowhere@x --out new", "--from takes RUN or RUN@STEP, a step being a whole number"),
        ("train pretrain:tiny --from", "argument --from: expected one argument"),
        ("train pretrain:tiny --offload true --remat none", "remat none does not: use remat attention"),
        ("train pretrain:tiny --data.sources text=nowhere", "data.sources text: nothing at nowhere"),
        ("train pretrain:tiny --data.vocab-size 500 --model.vocab-size 600", "give --model.vocab-size 500"),
        ("demo --train.stepz 3", "no option or field --train.stepz; the nearest is --train.steps"),
        ("export", "the following arguments are required: RUN, --to (see llama4 export --help)"),
        ("export nowhere --to new", "no checkpoints in nowhere"),
        ("export nowhere --to new --dtype int8", "invalid choice: 'int8'"),
        ("export nowhere --to new --learnr scout", "unrecognized arguments: --learnr scout; the nearest is --learner"),
        ("import nowhere --to new", "nowhere/config.json is missing"),
        ("verify nowhere", "nowhere/config.json is missing"),
        ("verify nowhere --tolerance big", "--tolerance: invalid float value: 'big'"),
        ("tokenizer encod", "'encod' (choose from"),
        ("tokenizer info --tokenizer nowhere", "no tokenizer at nowhere"),
        ("tokenizer train --to new --data.sources text=nowhere", "data.sources text: nothing at nowhere"),
        ("inspect scuot", "scout"),
    ],
)
def test_mistakes_take_one_line(line: str, message: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert message in failure(line, capsys)
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


def test_a_bad_document_is_named(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    assert "bad.jsonl, line 2" in failure(f"data inspect --data.sources text={tmp_path}/bad.jsonl", capsys)


def test_the_unforeseen_keeps_its_traceback(monkeypatch):
    from launch import verify

    def library_fails(args):
        import json

        json.loads("{")  # a ValueError, but of no input of ours

    monkeypatch.setattr(verify, "run", library_fails)
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["verify", "folder"])


def test_what_a_choice_needs_is_named_in_a_line(monkeypatch, capsys):
    """A package that a kernel or `--quant` wants; a module that is missing by mistake keeps its traceback."""
    from launch import verify
    from llama4_jax import quant

    monkeypatch.setitem(sys.modules, "qwix._src.core", None)
    quant._dot_general.cache_clear()
    monkeypatch.setattr(verify, "run", lambda args: quant._dot_general("fp8"))
    assert cli.main(["verify", "folder"]) == 2
    assert capsys.readouterr().err.endswith("run pip install -e '.[quant]'\n")

    def broken(args):
        import no_such_module  # noqa: F401  # pyright: ignore

    monkeypatch.setattr(verify, "run", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["verify", "folder"])


def test_interrupt_has_its_status(monkeypatch, capsys):
    from launch import verify

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupted)
    assert cli.main(["verify", "folder"]) == 130
    assert capsys.readouterr().err == "llama4: stopped\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_and_mistakes_import_nothing_heavy():
    lines = [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["train", "pretrain:tiny", "--help"],
             ["trian"], ["train", "pretrain:tyni"], ["train", "pretrain:tiny", "--train.steps", "x"]]  # fmt: skip
    code = (
        "import sys\nfrom launch.cli import main\n"
        f"for line in {lines!r}:\n"
        "    try:\n        status = main(line)\n    except SystemExit as error:\n        status = error.code\n"
        "    assert status in ((0, None) if '--help' in line else (2,)), (line, status)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, (line, loaded)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "--train.steps INT" in done.stdout and "Optimizer steps. (default:" in done.stdout
    assert "A tiny Scout on the embedded text" in done.stdout


def test_every_command_is_one(capsys):
    import importlib

    from launch import data

    for module, line in [*cli.COMMANDS.values(), *data.ACTIONS.values()]:
        loaded = importlib.import_module(module)
        if hasattr(loaded, "ACTIONS"):
            continue
        assert callable(loaded.run) and callable(loaded.add_arguments) and len(line) < 90


def test_fields_help_shows_short_names_and_current_defaults(capsys):
    import configs

    cfg = configs.find("pretrain:tiny")
    with pytest.raises(SystemExit):
        overrides.print_fields(cfg, "llama4 train pretrain:tiny")
    out = capsys.readouterr().out
    shown = {word for word in out.split() if word.startswith("--")}
    for path in overrides.leaves(cfg):
        if path != "name":
            option = "--" + path.removeprefix("learners.scout.").replace("_", "-")
            assert option in shown, option
    assert f"(default: {cfg.train.steps})" in out
