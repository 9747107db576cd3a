"""Co-distillation: a Behemoth teaches a Maverick and a Scout from one teacher pass.

A teacher is a learner named before its students. Without an optimizer it is frozen; with one it trains on the same
batch, and its own forward pass is what it teaches.
"""

from __future__ import annotations

from dataclasses import replace

from configs import full, pretrain
from llama4_jax.config import behemoth, maverick, scout, tiny_behemoth, tiny_maverick, tiny_scout
from training.config import Distillation, Learner, MeshConfig, RunConfig


def tiny() -> RunConfig:
    """A frozen tiny Behemoth teaches a tiny Maverick and a tiny Scout.

    Command:  llama4 train codistill:tiny
    Hardware: 2 CPU cores, two minutes, after llama4 train pretrain:tiny_behemoth_teacher
    Result:   held out, Scout 3.98 and Maverick 3.94 nats a token
    """
    teacher = replace(
        pretrain.tiny_learner(tiny_behemoth()), optimizer=None, init="run:runs/pretrain-tiny_behemoth_teacher"
    )
    return replace(pretrain.tiny(), name="codistill:tiny", learners={"behemoth": teacher, **_students()})


def tiny_images() -> RunConfig:
    """A frozen tiny Behemoth teaches a tiny Maverick and a tiny Scout, on text and images.

    Each has a vision tower of its own.

    Command:  llama4 train codistill:tiny_images
    Hardware: 2 CPU cores, three minutes, after llama4 train pretrain:tiny_behemoth_images
    Result:   held out, Maverick 3.92 and Scout 3.92 nats a token; they name 89 and 99 of 100 held-out digits
    """
    cfg = pretrain.with_digits(tiny(), "codistill:tiny_images")
    teacher = replace(cfg.learners["behemoth"], init="run:runs/pretrain-tiny_behemoth_images")
    return replace(cfg, learners=cfg.learners | {"behemoth": teacher})


def tiny_cotrained() -> RunConfig:
    """A tiny Behemoth teaches a tiny Maverick and a tiny Scout while it learns itself.

    Command:  llama4 train codistill:tiny_cotrained
    Hardware: 2 CPU cores, three minutes
    Result:   held out, Scout 4.70, Maverick 4.67, Behemoth 4.33 nats a token: behind labels alone (4.41), as the
              teacher is as young as its students
    """
    teacher = pretrain.tiny_learner(tiny_behemoth())
    return replace(pretrain.tiny(), name="codistill:tiny_cotrained", learners={"behemoth": teacher, **_students()})


def _students() -> dict[str, Learner]:
    taught = Distillation("behemoth", schedule="wsd", soft=0.9)
    models = {"maverick": tiny_maverick(), "scout": tiny_scout()}
    return {name: replace(pretrain.tiny_learner(model), distillation=taught) for name, model in models.items()}


def maverick_scout_from_behemoth() -> RunConfig:
    """Behemoth trains, and its own forward pass teaches Maverick and Scout on the same rows: one program.

    33.6M tokens a step (untuned), each learner by itself one row at a time on each device. The mesh holds four copies,
    as Scout's and Maverick's width of 5,120 cannot be stored over more than 1,024 devices.

    Command:  llama4 train codistill:maverick_scout_from_behemoth --data.sources text=DIR --data.tokenizer F
    Hardware: 4,096 v5p (v5p:16x16x16)
    Result:   never run; llama4 plan codistill:maverick_scout_from_behemoth --topology v5p:16x16x16
    """
    taught = Distillation("behemoth", schedule="wsd", soft=0.9)  # as in the tiny family, untuned
    how = full.EXPERTS_TRAVEL
    learners = {
        "behemoth": full.learner("behemoth", behemoth(), **how),
        "maverick": full.learner("maverick", maverick(), distillation=taught, **how),
        "scout": full.learner("scout", scout(), distillation=taught, **how),
    }
    mesh = MeshConfig(replica=4, expert=16)
    name = "codistill:maverick_scout_from_behemoth"
    return full.run(name, learners, full.TOKENS["behemoth"], 4096, 8192, mesh)


PRESETS = (tiny, tiny_images, tiny_cotrained, maverick_scout_from_behemoth)
