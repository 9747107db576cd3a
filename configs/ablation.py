"""Which way of distilling helps, and what protects from a bad teacher: many students of one teacher pass, side by side.

All arms of a run start from the same weights (`training/state.py`: what stands before a name's first `-` counts) and
read the same rows, so that over seeds their losses are paired. `make experiment` makes the teachers and the recorded
targets, runs the seeds and writes docs/experiments.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs import pretrain
from llama4_jax.config import tiny_behemoth, tiny_maverick, tiny_scout
from training.config import Distillation, Learner, RunConfig

FOLDER = "runs/ablation"
"""Of teachers and targets that `tools/experiment.py` makes."""
STEPS = 125


def tiny() -> RunConfig:
    """Tiny Scouts and Mavericks by weighting, divergence and placement of the teacher, with controls.

    Command:  make experiment
    Hardware: 2 CPU cores, some five minutes a seed
    Result:   docs/experiments.md
    """
    learners = {
        "behemoth": _teacher("teacher"),
        "behemoth-shuffled": _teacher("shuffled"),
        "behemoth-corrupted": _teacher("corrupted"),
        "young": pretrain.tiny_learner(tiny_behemoth()),
        **{f"scout-{name}": _student(tiny_scout(), **how) for name, how in ARMS.items()},
        **{f"maverick-{name}": _student(tiny_maverick(), **ARMS[name]) for name in MAVERICK_ARMS},
    }
    train = replace(pretrain.TRAIN, steps=STEPS, batch=4, eval_every=STEPS, checkpoint_every=STEPS, eval_batches=16)
    return RunConfig("ablation:tiny", learners, pretrain.DATA, train=train)


RATE = 3e-3
CONSTANT: dict[str, Any] = dict(teacher="behemoth", schedule="constant", soft=0.9)
ARMS: dict[str, dict[str, Any]] = {
    # labels alone, at three rates: the best of them is what the others are held against
    "labels": dict(),
    "labels_slow": dict(rate=RATE / 2),
    "labels_fast": dict(rate=RATE * 2),
    # by schedule
    "constant": CONSTANT,
    "wsd": CONSTANT | dict(schedule="wsd"),
    # by weighting
    "confidence": CONSTANT | dict(weighting="confidence"),
    "disagreement": CONSTANT | dict(weighting="disagreement"),
    "gradient_norm": CONSTANT | dict(weighting="gradient_norm"),
    "competence": CONSTANT | dict(weighting="competence"),
    # by divergence
    "reverse_kl": CONSTANT | dict(divergence="reverse_kl"),
    "jsd": CONSTANT | dict(divergence="jsd", skew=0.5),
    "taid": CONSTANT | dict(taid_start=0.4),
    # by placement
    "stratified": CONSTANT | dict(teacher=f"targets:{FOLDER}/stratified"),
    "young": CONSTANT | dict(teacher="young"),
    "young_competence": CONSTANT | dict(teacher="young", weighting="competence"),
    # controls: a teacher whose vocabulary is shuffled must hurt; of one that is corrupted on code a gate must protect
    "shuffled": CONSTANT | dict(teacher="behemoth-shuffled"),
    "corrupted": CONSTANT | dict(teacher="behemoth-corrupted"),
    "corrupted_competence": CONSTANT | dict(teacher="behemoth-corrupted", weighting="competence"),
}
MAVERICK_ARMS = ("labels", "constant")


def _teacher(kind: str) -> Learner:
    return replace(pretrain.tiny_learner(tiny_behemoth()), optimizer=None, init=f"run:{FOLDER}/{kind}")


def _student(model: Any, rate: float = RATE, **distillation: Any) -> Learner:
    learner = pretrain.tiny_learner(model)
    assert learner.optimizer
    optimizer = replace(learner.optimizer, learning_rate=rate, warmup=25)
    return replace(learner, optimizer=optimizer, distillation=Distillation(**distillation))


PRESETS = (tiny,)
