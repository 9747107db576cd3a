"""A student of recorded targets: it learns as from the teacher itself, resumes exactly, and refuses what is not its."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from data.loader import Corpus
from training.config import Distillation, RunConfig
from training.loop import train
from training.metrics import read
from training.target_record import Form
from training.teach import teach

quiet: Any = dict(log=lambda _: None)


@pytest.fixture(scope="module")
def recorded(run_config, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of a frozen teacher and a student of it, and the folder of the teacher's 64 largest of 320."""
    folder = tmp_path_factory.mktemp("recorded")
    cfg = run_config(folder / "teacher", steps=6, checkpoint_every=6)
    train(cfg, corpus, **quiet)
    learner = cfg.learners["scout"]
    teacher = replace(learner, optimizer=None, init=f"run:{folder / 'teacher'}")
    student = replace(learner, distillation=Distillation("behemoth", schedule="constant", weighting="student_entropy"))
    cfg = replace(cfg, learners={"behemoth": teacher, "scout": student})
    cfg = replace(cfg, train=replace(cfg.train, steps=8, checkpoint_every=4))
    teach(cfg, corpus, folder / "targets", Form("topk", 64, 0), **quiet)
    return cfg, folder


def student_alone(recorded: tuple[RunConfig, Path], out: Path, **changes: Any) -> RunConfig:
    cfg, folder = recorded
    student = cfg.learners["scout"]
    taught = replace(student.distillation, teacher=f"targets:{folder / 'targets'}")
    return replace(cfg, learners={"scout": replace(student, distillation=taught)}, out=str(out), **changes)


def records(folder: Path) -> list[dict[str, Any]]:
    return read(epath.Path(folder))


@pytest.fixture(scope="module")
def unbroken(recorded, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(student_alone(recorded, out), corpus, **quiet)
    return out


def test_it_learns_as_from_the_teacher(recorded, unbroken: Path, corpus: Corpus, tmp_path: Path):
    """The targets are rounded to 8 bits and hold 64 of 320 probabilities, so that paths part slowly."""
    train(replace(recorded[0], out=str(tmp_path / "live")), corpus, **quiet)
    both = list(zip(records(unbroken), records(tmp_path / "live"), strict=True))
    for of_store, live in both[:3]:
        for name in ("ce", "kl", "teacher_ce", "teacher_entropy", "soft", "hard", "ce/even", "kl/odd"):
            assert of_store[name] == pytest.approx(live[f"scout/{name}"], rel=0.02, abs=0.02), name
    for of_store, live in both:
        assert of_store["ce"] == pytest.approx(live["scout/ce"], rel=0.03)
        assert of_store["teacher_ce"] == pytest.approx(live["scout/teacher_ce"], rel=1e-3)
        assert of_store["missing"] == 0 and of_store["teacher_step"] == 6 and "reverse_kl" not in of_store
        assert live["scout/reverse_kl"] > 0 and "scout/staleness" not in live


def test_resumed_equals_unbroken(recorded, unbroken: Path, corpus: Corpus, tmp_path: Path):
    """The running means of the weights are in the checkpoint: without them the fifth step would weigh otherwise."""
    out = tmp_path / "run"
    constant = replace(recorded[0].learners["scout"].optimizer, decay=0.0)

    def cfg(steps: int) -> RunConfig:
        run = student_alone(recorded, out)
        learners = {"scout": replace(run.learners["scout"], optimizer=constant)}
        return replace(run, learners=learners, train=replace(run.train, steps=steps))

    train(cfg(4), corpus, **quiet)
    train(cfg(8), corpus, **quiet)
    whole = replace(cfg(8), out=str(tmp_path / "whole"))
    train(whole, corpus, **quiet)
    for resumed, one in zip(records(out), records(tmp_path / "whole"), strict=True):
        for name in ("loss", "soft", "kl", "grad_norm"):
            assert resumed[name] == one[name]
    soft = [r["soft"] for r in records(out)]
    assert len(set(soft)) == len(soft)  # they move at every step


def test_rows_without_targets_learn_from_labels_alone(recorded, corpus: Corpus, tmp_path: Path):
    """Rows of another seed are cut otherwise: some pieces are new."""
    run = student_alone(recorded, tmp_path / "run")
    train(replace(run, train=replace(run.train, seed=5)), corpus, **quiet)
    missing = [r["missing"] for r in records(tmp_path / "run")]
    assert 0 < np.mean(missing) < 1
    for record in records(tmp_path / "run"):  # h = 1 - 0.9 where there is a target, else 1
        assert record["hard"] == pytest.approx(1 - 0.9 * (1 - record["missing"]), abs=1e-5)


def test_other_targets_are_refused(recorded, corpus: Corpus, tmp_path: Path):
    run = student_alone(recorded, tmp_path / "run")
    wider = replace(run.learners["scout"], model=replace(run.learners["scout"].model, vocab_size=384))
    with pytest.raises(ValueError, match="vocabulary of 320, but this run has 384"):
        train(replace(run, learners={"scout": wider}), corpus, **quiet)
    nowhere = replace(run.learners["scout"].distillation, teacher=f"targets:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match="no targets in"):
        train(replace(run, learners={"scout": replace(run.learners["scout"], distillation=nowhere)}), corpus, **quiet)
