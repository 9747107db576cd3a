"""Overrides reach the configuration, by every spelling, and wrong ones name the nearest choice."""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import replace

import pytest

import configs
from launch import cli, overrides
from training import plan
from training.config import RunConfig


def preset() -> RunConfig:
    return configs.find("pretrain:tiny")


def apply(line: str, cfg: RunConfig | None = None) -> RunConfig:
    rest, given = overrides.split(line.split(), ["--json", "--show"])
    assert rest == []
    return overrides.apply(cfg or preset(), argparse.Namespace(overrides=given, options=["--json", "--show"]))


def two_learners() -> RunConfig:
    cfg = preset()
    return replace(cfg, learners={"teacher": cfg.learners["scout"], "student": cfg.learners["scout"]})


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--train.steps 7", lambda c: c.train.steps == 7),
        ("--train.steps=7", lambda c: c.train.steps == 7),
        ("--train.seq-len 512", lambda c: c.train.seq_len == 512),
        ("--train.seq_len 512", lambda c: c.train.seq_len == 512),
        ("--mesh.fsdp -1 --mesh.expert 2", lambda c: (c.mesh.fsdp, c.mesh.expert) == (-1, 2)),
        ("--out some/where", lambda c: c.folder == "some/where"),
        ("--data.sources text=some/file.jsonl", lambda c: c.data.sources == {"text": "some/file.jsonl"}),
        ("--data.sources a day=1,2/x b=c=d e f", lambda c: c.data.sources == {"a": "day=1,2/x", "b": "c=d", "e": "f"}),
        ("--data.weights code 0.3 prose 0.7", lambda c: c.data.weights == {"code": 0.3, "prose": 0.7}),
        ("--data.weights code=0.3 prose=0.7", lambda c: c.data.weights == {"code": 0.3, "prose": 0.7}),
        ("--data.weights code=0.3,prose=0.7", lambda c: c.data.weights == {"code": 0.3, "prose": 0.7}),
        ("--learners.scout.model.num-layers 8", lambda c: c.learners["scout"].model.num_layers == 8),
        ("--model.num-layers 8", lambda c: c.learners["scout"].model.num_layers == 8),
        ("--model.qk-norm false", lambda c: c.learners["scout"].model.qk_norm is False),
        ("--model.rope.theta 1e6", lambda c: c.learners["scout"].model.rope.theta == 1e6),
        ("--optimizer.learning-rate 1e-4", lambda c: c.learners["scout"].optimizer.learning_rate == 1e-4),
        ("--init hf:DIR", lambda c: c.learners["scout"].init == "hf:DIR"),
        ("--remat block", lambda c: c.learners["scout"].remat == "block"),
        ("--train.steps 5 --train.steps 6", lambda c: c.train.steps == 6),
    ],
)
def test_reaches_the_config(line: str, value):
    assert not value(preset()) or "-1" in line
    assert value(apply(line))


def test_changes_nothing_else():
    assert apply("") == preset()
    assert apply("--model.num-layers 8 --model.num-layers 4") == preset()
    changed = apply("--train.steps 7")
    assert replace(changed, train=preset().train) == preset()


def test_is_validated_as_a_whole():
    """Each of these two alone is an error: rows must hold whole chunks."""
    cfg = apply("--train.seq-len 320 --model.chunk 64")
    assert (cfg.train.seq_len, cfg.learners["scout"].model.chunk) == (320, 64)
    with pytest.raises(ValueError, match="must be a multiple"):
        apply("--train.seq-len 320")


def test_models_follow_the_size_of_the_tokenizer_trained_here():
    cfg = apply("--data.vocab-size 1000")
    assert cfg.learners["scout"].model.vocab_size == 1000
    overrides.check_vocabulary(cfg)
    cfg = apply("--data.vocab-size 1000 --model.vocab-size 2000")
    with pytest.raises(ValueError, match=r"trained here has 1000 tokens: give --model.vocab-size 1000"):
        overrides.check_vocabulary(cfg)
    cfg = apply("--data.vocab-size 1000 --data.tokenizer some.model")
    assert cfg.learners["scout"].model.vocab_size == 2048  # it is the given tokenizer's size that counts
    overrides.check_vocabulary(cfg)
    overrides.check_vocabulary(cfg, 2048)
    with pytest.raises(ValueError, match=r"the tokenizer some.model has 202048 tokens: give --model.vocab-size 202048"):
        overrides.check_vocabulary(cfg, 202_048)


def test_stages_are_reached_by_their_numbers():
    line = "--stages.0.after 7 --stages.0.seq-len 1024 --stages.0.mesh.context 2 --stages.0.schedule.peak 0.5"
    cfg = apply(f"{line} --stages.0.weights code 1 --train.steps 9", configs.find("pretrain:tiny_long"))
    (stage,) = cfg.stages
    assert (stage.after, stage.seq_len, stage.mesh.context, stage.schedule.peak) == (7, 1024, 2, 0.5)
    assert stage.batch == 2 and stage.weights == {"code": 1.0} and cfg.at(7).train.seq_len == 1024


def test_several_learners_need_their_names():
    cfg = apply("--learners.student.model.num-layers 8", two_learners())
    assert (cfg.learners["teacher"].model.num_layers, cfg.learners["student"].model.num_layers) == (4, 8)
    with pytest.raises(ValueError, match=r"no option or field --model.num-layers; .* --learners.teacher.model.num-l"):
        apply("--model.num-layers 8", two_learners())
    cfg = apply("--data.vocab-size 1000", two_learners())
    assert {learner.model.vocab_size for learner in cfg.learners.values()} == {1000}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train.stepz 3", "no option or field --train.stepz; the nearest is --train.steps"),
        ("--steps 3", "no option or field --steps; the nearest is --train.steps"),
        ("--num-layers 8", "no option or field --num-layers; the nearest is --model.num-layers"),
        ("--jsno", "no option or field --jsno; the nearest is --json"),
        ("--data 3", "no option or field --data; the nearest is --data"),
        ("--train.steps", "--train.steps needs a value"),
        ("--train.steps 3 4", "--train.steps takes one value, not 2: 3 4"),
        ("--train.steps 3.5", "--train.steps is a whole number, not '3.5'"),
        ("--optimizer.b1 high", "--optimizer.b1 is a number, not 'high'"),
        ("--model.qk-norm flase", "--model.qk-norm is one of true, false, not 'flase'; the nearest is 'false'"),
        ("--compute-dtype bf16", "is one of float32, bfloat16, not 'bf16'; the nearest is 'bfloat16'"),
        ("--data.weights code", "--data.weights takes pairs, e.g. code 0.3 prose 0.7, not 'code'"),
        ("--data.weights code much", "--data.weights code is a number, not 'much'"),
        ("--train.steps 0", "train.steps must be at least 1, not 0"),
        ("--model.num-layers 6", "the nearest is 8"),
    ],
)
def test_errors_say_what_would_be_right(line: str, message: str):
    with pytest.raises(ValueError) as error:
        apply(line)
    assert message in str(error.value)


def test_split_leaves_known_options_and_names_alone():
    words = ["train", "pretrain:tiny", "--json", "--train.steps", "5", "--show", "3", "--model.chunk=64"]
    rest, given = overrides.split(words, ["--json", "--show"])
    assert rest == ["train", "pretrain:tiny", "--json", "--show", "3"]
    assert given == [["--train.steps", "5"], ["--model.chunk", "64"]]


@pytest.mark.parametrize("name", configs.PRESETS)
def test_options_that_presets_and_plans_name_are_read(name: str):
    """What a preset's first lines tell one to run, and what a plan tells one to change."""
    cfg = configs.find(name)
    told = re.search(r"Command: +(.*?)(?=\n +Hardware:)", configs.PRESETS[name].__doc__ or "", re.DOTALL)
    assert told, name
    for command in re.findall(rf"llama4 train {name}[^(]*?(?=, then|\(|$)", " ".join(told[1].split())):
        args, _ = cli._parse(command.split()[1:])
        assert isinstance(overrides.apply(cfg, args), RunConfig)
    for learner in cfg.learners:
        for option, change in plan.changes(cfg, learner):
            with contextlib.suppress(ValueError):  # of a mesh that is none
                assert apply(option, cfg) == change(cfg)


def test_an_option_of_one_of_several_learners_is_one():
    cfg = configs.find("codistill:maverick_scout_from_behemoth")
    option, change = next(plan.changes(cfg, "scout"))
    assert option == "--learners.scout.remat nested" and apply(option, cfg) == change(cfg) != cfg
