"""Runs whose teacher is another program: those of recorded targets, resumed as unbroken, and what a death does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from support import ROOT, kill, running

from data.loader import Corpus
from training import stream
from training.config import Distillation, RunConfig
from training.loop import train
from training.metrics import read
from training.record import write_config
from training.serve import make_server
from training.stream import Stream
from training.target_record import Form
from training.targets import Reader
from training.teach import teach

FORM = Form("stratified", 4, 2)
FORM_FLAGS = ("--top", "4", "--draws", "2")


def quiet(_: str) -> None:
    """No lines."""


@pytest.fixture(scope="module")
def taught(run_config, corpus: Corpus, tmp_path_factory) -> tuple[RunConfig, Path]:
    """The configuration of a student's run with a teacher of two steps, and a store of what that one says."""
    folder = tmp_path_factory.mktemp("taught")
    cfg = run_config(folder / "teacher", steps=2, eval_every=2, checkpoint_every=2)
    train(cfg, corpus, quiet)
    (learner,) = cfg.learners.values()
    whole = run_config(folder / "run")
    teacher = replace(whole, learners={"scout": replace(learner, init=f"run:{folder / 'teacher'}")})
    teach(teacher, corpus, folder / "store", FORM, log=quiet)
    return teacher, folder / "store"


def of_student(cfg: RunConfig, source: str, out: Path) -> RunConfig:
    (learner,) = cfg.learners.values()
    learner = replace(learner, init="", distillation=Distillation(source, soft=0.5, schedule="constant"))
    return replace(cfg, learners={"scout": learner}, out=str(out))


def story(cfg: RunConfig) -> list[dict]:
    """A run's records without what depends on the clock."""
    clock = {"time", "tokens_per_second", "seconds_per_step", "data_wait", "tflops"}
    return [
        {k: v for k, v in record.items() if k not in clock and "seconds/" not in k}
        for record in read(epath.Path(cfg.folder))
    ]


class Killed(Exception):
    """What ends a run."""


def test_a_run_from_a_stream_is_that_from_a_store(taught, corpus: Corpus, tmp_path: Path, monkeypatch):
    """Unbroken, and resumed from a checkpoint that was saved with batches drawn ahead; and rows of other batches."""
    cfg, store = taught
    recorded = of_student(cfg, f"targets:{store}", tmp_path / "recorded")
    train(recorded, corpus, quiet)
    assert story(recorded)[-1]["teacher_step"] == 2
    server = make_server(cfg, corpus.tokenizer.hash, FORM, "127.0.0.1", 0, log=quiet)
    with running(server):
        streamed = of_student(cfg, f"stream:{server.address}", tmp_path / "streamed")
        train(streamed, corpus, quiet)
        assert story(streamed) == story(recorded)

        broken, looked_up, look_up = replace(streamed, out=str(tmp_path / "broken")), [], Stream.look_up

        def die(self, batch):
            looked_up.append(batch)
            if len(looked_up) == 6:
                raise Killed
            return look_up(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "look_up", die)
            with pytest.raises(Killed):
                train(broken, corpus, quiet)
        lines = []
        train(broken, corpus, lines.append)
        assert any("going on after step 4" in line for line in lines)
        assert story(broken) == story(recorded)

        # Rows that the mesh does not divide, and more than it takes at a time; up to rounding the same.
        source = Stream(server.address, corpus.tokenizer.hash, cfg.learners["scout"].model.vocab_size, 16, say=quiet)
        with closing(source), closing(corpus.train(11, 32, 16, cfg.train.seed)) as rows, Reader(store) as reader:
            batch = next(rows)
            ours, theirs = source.look_up(batch), reader.look_up(batch)
            assert np.array_equal(ours.present, batch.segment_ids > 0)
            both = ours.present & theirs.present
            assert both.mean() > 0.5 and np.mean(ours.ids[both] == theirs.ids[both]) > 0.99
            np.testing.assert_allclose(ours.entropy[both], theirs.entropy[both], rtol=2e-3)


def test_a_run_whose_teacher_dies_ends_with_its_checkpoint(taught, corpus: Corpus, tmp_path: Path, monkeypatch):
    cfg, store = taught
    monkeypatch.setattr(stream, "PATIENCE", 1.0)
    server = make_server(cfg, corpus.tokenizer.hash, FORM, "127.0.0.1", 0, log=quiet)
    run = of_student(cfg, f"stream:{server.address}", tmp_path / "run")
    run = replace(run, train=replace(run.train, steps=12))  # beyond what was asked for when it dies
    looked_up, look_up = [], Stream.look_up

    def dying(self, batch):
        looked_up.append(batch)
        if len(looked_up) == 6:
            kill(server)
        return look_up(self, batch)

    with running(server), monkeypatch.context() as patch:
        patch.setattr(Stream, "look_up", dying)
        with pytest.raises(ConnectionError, match=f"no teacher at {server.address} for"):
            train(run, corpus, quiet)
    # What was on its way when it died may be used or lost: it ends after step 5 to 10.
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) in (["4"], ["4", "8"])
    # The same run goes on from recorded targets.
    again = replace(run, learners=of_student(cfg, f"targets:{store}", tmp_path).learners)
    assert train(again, corpus, quiet)["complete"]


def test_several_processes_are_refused(taught, corpus: Corpus, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="answers from one process with all of its devices, but this program has 2"):
        make_server(taught[0], corpus.tokenizer.hash, FORM, "127.0.0.1", 0)


@pytest.mark.slow
def test_two_programs_and_the_death_of_one(taught, documents: Path, tmp_path: Path):
    """`llama4 targets serve` is killed while `llama4 train` runs, and started again on its port."""
    cfg, store = taught
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    llama4 = [sys.executable, "-m", "launch.cli"]
    for folder, of in (("teacher", cfg), ("student", of_student(cfg, f"targets:{store}", tmp_path / "student"))):
        data = replace(
            of.data,
            sources={"text": str(documents)},
            vocab_size=320,
            heldout=0.1,
            tokenizer=str(store.parent / "teacher"),
        )
        long = replace(of.train, steps=60, checkpoint_every=20, eval_every=30, log_every=1)
        write_config(epath.Path(tmp_path / folder), replace(of, data=data, train=long, out=""))

    def serve(port: int) -> tuple[subprocess.Popen, int]:
        command = [*llama4, "targets", "serve", str(tmp_path / "teacher"), "--listen", f"127.0.0.1:{port}"]
        process = subprocess.Popen([*command, *FORM_FLAGS], env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for line in process.stdout:
            if found := re.match(r"listening on 127.0.0.1:(\d+)", line):
                return process, int(found[1])
        raise AssertionError(process.wait())

    def student(out: str, source: str) -> subprocess.Popen:
        command = [*llama4, "train", str(tmp_path / "student"), "--out", str(tmp_path / out), "--distillation.teacher"]
        return subprocess.Popen([*command, source], env=env, stdout=subprocess.PIPE, text=True)

    first, port = serve(0)
    run = student("streamed", f"stream:127.0.0.1:{port}")
    assert run.stdout
    for line in run.stdout:
        if line.startswith("step 10/"):
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()  # closes its pipe, too
    second, again = serve(port)
    rest = run.communicate(timeout=500)[0]
    assert again == port and run.returncode == 0 and "lost the teacher at" in rest, rest
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert second.returncode == 0
    last = student("alone", f"stream:127.0.0.1:{port}")  # an unbroken one of the same rows
    third, _ = serve(port)
    assert last.communicate(timeout=500) and last.returncode == 0
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=60)
    assert third.returncode == 0
    streamed, alone = (replace(cfg, out=str(tmp_path / name)) for name in ("streamed", "alone"))
    assert len(story(streamed)) == 60 and story(streamed) == story(alone)
