"""Which way of distilling helps, and what protects from a bad teacher: students of one teacher pass, side by side.

All arms start from the same weights (`training/state.py`: what stands before a name's first `-` counts) and
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


def labels() -> RunConfig:
    """Labels alone, at three learning rates: the best of them is what all other arms are held against.

    Command:  llama4 train ablation:labels
    Hardware: 2 CPU cores, not timed by itself
    Result:   docs/experiments.md
    """
    return _run("labels", "labels", "labels_slow", "labels_fast", maverick="labels")


def weighting() -> RunConfig:
    """How much soft targets weigh over time, by token, by gradient and by domain.

    Command:  llama4 train ablation:weighting
    Hardware: 2 CPU cores, not timed by itself
    Result:   docs/experiments.md
    """
    arms = ("constant", "wsd", "confidence", "gradient_norm", "competence")
    return _run("weighting", *arms, maverick="constant")


def divergence() -> RunConfig:
    """What is compared with the teacher.

    Command:  llama4 train ablation:divergence
    Hardware: 2 CPU cores, not timed by itself
    Result:   docs/experiments.md
    """
    return _run("divergence", "reverse_kl", "jsd", "taid")


def placement() -> RunConfig:
    """Recorded targets, and a teacher as young as its students, which trains beside them.

    Command:  llama4 train ablation:placement
    Hardware: 2 CPU cores, not timed by itself
    Result:   docs/experiments.md
    """
    return _run("placement", "stratified", "young", "young_competence")


def controls() -> RunConfig:
    """Two bad teachers, which must hurt, and a gate that must protect from one of them.

    Command:  llama4 train ablation:controls
    Hardware: 2 CPU cores, not timed by itself
    Result:   docs/experiments.md
    """
    return _run("controls", "shuffled", "corrupted", "corrupted_competence")


RATE = 3e-3
CONSTANT: dict[str, Any] = dict(teacher="behemoth", schedule="constant", soft=0.9)
ARMS: dict[str, dict[str, Any]] = {
    # labels alone
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
    # controls
    "shuffled": CONSTANT | dict(teacher="behemoth-shuffled"),
    "corrupted": CONSTANT | dict(teacher="behemoth-corrupted"),
    "corrupted_competence": CONSTANT | dict(teacher="behemoth-corrupted", weighting="competence"),
}


def _run(name: str, *arms: str, maverick: str = "") -> RunConfig:
    """Scouts of these arms, a Maverick of one, and the teachers they need."""
    students = {f"scout-{arm}": _student(tiny_scout(), **ARMS[arm]) for arm in arms}
    if maverick:
        students[f"maverick-{maverick}"] = _student(tiny_maverick(), **ARMS[maverick])
    needed = {learner.distillation.teacher for learner in students.values()}
    teachers = {
        "behemoth": _teacher("teacher"),
        "behemoth-shuffled": _teacher("shuffled"),
        "behemoth-corrupted": _teacher("corrupted"),
        "young": pretrain.tiny_learner(tiny_behemoth()),
    }
    learners = {name: learner for name, learner in teachers.items() if name in needed} | students
    train = replace(pretrain.TRAIN, steps=STEPS, batch=4, eval_every=STEPS, checkpoint_every=STEPS, eval_batches=16)
    return RunConfig(f"ablation:{name}", learners, pretrain.DATA, train=train)


def _teacher(kind: str) -> Learner:
    return replace(pretrain.tiny_learner(tiny_behemoth()), optimizer=None, init=f"run:{FOLDER}/{kind}")


def _student(model: Any, rate: float = RATE, **distillation: Any) -> Learner:
    learner = pretrain.tiny_learner(model)
    assert learner.optimizer
    optimizer = replace(learner.optimizer, learning_rate=rate, warmup=25)
    return replace(learner, optimizer=optimizer, distillation=Distillation(**distillation))


PRESETS = (labels, weighting, divergence, placement, controls)
