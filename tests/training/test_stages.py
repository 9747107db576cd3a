"""Stages: what each is as a plain run, what is read in it, and a run across them, ended on both sides and forked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from data.config import DataConfig
from data.loader import Corpus, documents_read
from training import fork, loop
from training.checkpoint import Checkpoints, restore_params
from training.config import MeshConfig, RunConfig, Schedule, Stage
from training.loop import train
from training.metrics import read
from training.optimizer import learning_rate
from training.record import check_resumable, config_from_json, run_record

CLOCK = {"time", "tokens_per_second", "seconds_per_step", "data_wait", "tflops"}
LONG = Stage(
    4, batch=4, seq_len=64, weights={"odd": 0.8}, mesh=MeshConfig(context=4), schedule=Schedule(0.5, decay=1.0)
)


def quiet(_: str) -> None:
    """No lines."""


def story(folder: str | Path) -> list[dict]:
    """A run's records without what depends on the clock."""
    return [
        {k: v for k, v in record.items() if k not in CLOCK and "seconds/" not in k}
        for record in read(epath.Path(folder))
    ]


def assert_same_weights(*folders: str) -> None:
    first, *others = (jax.tree.leaves(restore_params(folder).params) for folder in folders)
    for leaves in others:
        for a, b in zip(first, leaves, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture
def make_staged(make_run, documents) -> Callable[..., RunConfig]:
    """Rows of 32 tokens on eight devices, after step 4 fewer ones of 64, mostly odd, over a context axis."""

    def make(out: str = "run", stages: tuple[Stage, ...] = (LONG,), **changes) -> RunConfig:
        data = DataConfig(sources={"text": str(documents)}, vocab_size=320, heldout=0.1)
        return replace(make_run(out, **dict(checkpoint_every=3) | changes), data=data, stages=stages)

    return make


class Killed(Exception):
    """What a test ends a run with."""


def killed_at(step: int, cfg: RunConfig, corpus: Corpus) -> None:
    """Trains until the step is under way."""
    begin = loop.Reporter.begin

    def deadly(self, now):
        if now.step == step:
            raise Killed
        begin(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Reporter, "begin", deadly)
        with pytest.raises(Killed):
            train(cfg, corpus, quiet)


# --- What a stage is


def test_a_plain_run_is_its_only_stage(make_run):
    cfg = make_run()
    assert cfg.at(0) is cfg and cfg.at(7) is cfg and cfg.stage_end(0) == cfg.stage_end(7) == 8


def test_a_stage_is_a_plain_run_with_its_own_rows(make_staged):
    last = Stage(6, sources={"text": "other.jsonl"}, microbatches=2, remat="layer")
    cfg = make_staged(stages=(LONG, last))
    first, long, other = (cfg.at(done) for done in (3, 4, 6))
    assert [cfg.stage_end(done) for done in (0, 3, 4, 5, 6, 7)] == [4, 4, 6, 6, 8, 8]
    assert replace(first, train=cfg.train) == replace(cfg, stages=())
    assert (long.train.batch, long.train.seq_len, long.mesh.context) == (4, 64, 4)
    assert long.data == replace(cfg.data, weights={"odd": 0.8})
    # What a stage leaves out is as in the run, not as in the stage before it; but the rate goes on.
    assert (other.train.batch, other.train.seq_len, other.mesh.context) == (8, 32, 1)
    assert other.data == replace(cfg.data, sources={"text": "other.jsonl"}, weights={})
    scout = other.learners["scout"]
    assert (scout.microbatches, scout.remat) == (2, "layer")
    assert scout.optimizer == long.learners["scout"].optimizer and other.train.steps == long.train.steps == 8
    assert not any(view.stages for view in (first, long, other))


def rates(cfg: RunConfig) -> np.ndarray:
    """The learning rate of every step."""
    views = [cfg.at(done) for done in range(cfg.train.steps)]
    return np.array([
        float(learning_rate(view.learners["scout"].optimizer, view.train.steps)(done))
        for done, view in enumerate(views)
    ])  # fmt: skip


def test_a_schedule_is_a_segment_and_none_goes_on(make_staged):
    plain = rates(make_staged(stages=(), steps=100))
    np.testing.assert_array_equal(rates(make_staged(stages=(Stage(30, batch=16), Stage(90)), steps=100)), plain)

    low = Schedule(peak=0.1, warmup=5, decay=0.5, final=0.2)
    rate = rates(make_staged(stages=(Stage(40, schedule=low), Stage(70)), steps=100))
    np.testing.assert_array_equal(rate[:40], rates(make_staged(stages=(), steps=40)))
    peak = 1e-2 * 0.1
    np.testing.assert_allclose(rate[40:45], peak * np.arange(1, 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(rate[45:71], peak, rtol=1e-6)  # half of the 60 steps are held, whatever stages begin
    np.testing.assert_allclose(rate[85], peak * 0.6, rtol=1e-6)
    assert all(a > b for a, b in pairwise(rate[70:])) and rate[99] > 0.2 * peak


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(8),), r"a stage begins after step 8, which must be less than train.steps \(8\)"),
        ((Stage(5), Stage(3)), r"a stage begins after step 5, which must be less than the next stage's after \(3\)"),
        ((Stage(4, seq_len=40),), r"after step 4: train.seq_len \(40\) must be a multiple .*: the nearest is 32"),
        ((Stage(4, schedule=Schedule(decay=2.0)),), r"after step 4: optimizer.decay is a share of the steps"),
    ],
)
def test_mistakes_name_the_stage(make_staged, stages, message):
    with pytest.raises(ValueError, match=message):
        make_staged(stages=stages)


def test_stages_come_back_from_json(make_staged):
    cfg = replace(make_staged(stages=(LONG, Stage(6, remat="block"))), fork="runs/x@3")
    assert config_from_json(run_record(cfg, "")["config"]) == cfg


def test_what_has_begun_is_guarded_and_what_has_not_is_free(make_staged):
    def check(old: tuple[Stage, ...], new: tuple[Stage, ...], done: int) -> list[str]:
        records = [run_record(make_staged(stages=stages), "") for stages in (old, new)]
        return check_resumable(*records, "runs/x", done)

    shorter = replace(LONG, seq_len=32)
    for done in (3, 4):  # step 5 is its first
        assert check((LONG,), (shorter,), done) == ["stages.0.seq_len: 64 -> 32"]
        assert check((), (LONG,), done) and check((LONG,), (), done)
    free = replace(LONG, mesh=MeshConfig(), microbatches=2, remat="block", schedule=Schedule(0.1))
    assert len(check((LONG,), (free,), 5)) == 5
    for old, new, text in (
        ((LONG,), (shorter,), r"stages\.0\.seq_len = 64, not 32"),
        ((LONG,), (), r"stages\.0\.\w+ = "),
        ((), (LONG,), r"stages\.0\.\w+ = 'absent'"),
    ):
        with pytest.raises(ValueError, match=f"runs/x was trained with {text}"):
            check(old, new, 5)


# --- What is read


def documents_of(batches) -> list[tuple[int, int]]:
    """(domain, document) of every piece, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                at = np.flatnonzero(batch.segment_ids[row] == segment)[0]
                found.append((int(batch.domain[row, at]), int(batch.document_id[row, at])))
    return found


def test_the_next_stage_reads_on_where_the_one_before_was(corpus):
    """Other rows begin behind the documents that were read, so that no document comes twice; the same rows go on."""
    short = corpus.train(2, 32, 16, 0)
    before = documents_of(next(short) for _ in range(12))
    place = json.loads(json.dumps(short.get_state()))
    following = next(short)
    short.close()

    same = corpus.train(2, 32, 16, 0, 0, 1, place, True)
    np.testing.assert_array_equal(next(same).tokens, following.tokens)
    same.close()

    other = corpus.of(DataConfig(sources=corpus._cfg.sources, vocab_size=320, heldout=0.1, weights={"odd": 0.9}))
    with pytest.raises(ValueError, match="another data stream: seq_len, shares changed"):
        other.train(2, 64, 16, 0, 0, 1, place)
    long = other.train(2, 64, 16, 0, 0, 1, place, True)
    batches = [next(long) for _ in range(6)]
    middle, after = json.loads(json.dumps(long.get_state())), next(long)
    long.close()
    seen = documents_of(batches)
    assert len(set(before)) > 10 and len(set(seen)) > 10 and not set(before) & set(seen)
    assert np.mean([domain for domain, _ in seen]) > 0.7, "mostly odd"
    assert all(batch.first_visit[batch.segment_ids > 0].all() for batch in batches)

    again = other.train(2, 64, 16, 0, 0, 1, middle)  # ended within the stage
    for ours, theirs in zip(next(again), after, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (before_even, even), (before_odd, odd) = documents_read(middle)[corpus.hash].values()
    assert [before_even, before_odd] == [one for (one,) in documents_read(place)[corpus.hash].values()]
    assert sum(odd) > 4 * sum(even), "of mostly odd ones"
    again.close()


def test_other_documents_begin_at_their_beginning_and_the_first_ones_are_remembered(corpus, tmp_path):
    file = tmp_path / "more.jsonl"
    file.write_text(
        "\n".join(json.dumps(dict(text=f"other text number {n} of the run", domain="new")) for n in range(99))
    )
    more = corpus.of(replace(corpus._cfg, sources={"text": str(file)}), quiet)
    assert more.domains == ("new",) and more.tokenizer is corpus.tokenizer and corpus.of(corpus._cfg) is corpus
    stream = corpus.train(2, 32, 16, 0)
    next(stream)
    first = stream.get_state()
    stream.close()
    stream = more.train(2, 32, 16, 0, 0, 1, first, True)
    next(stream)
    second = stream.get_state()
    stream.close()
    first_read, second_read = documents_read(first), documents_read(second)
    assert second_read[corpus.hash] == first_read[corpus.hash] and sum(second_read[more.hash]["new"][0]) > 0
    back = corpus.train(2, 64, 16, 0, 0, 1, second, True)
    assert back.get_state()["stream"]["behind"] == second_read
    back.close()


# --- A run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_config, documents, corpus) -> tuple[RunConfig, list[str]]:
    """An unbroken run of eight steps in two stages, and its lines."""
    out = tmp_path_factory.mktemp("staged") / "run"
    data = DataConfig(sources={"text": str(documents)}, vocab_size=320, heldout=0.1)
    cfg, lines = replace(run_config(out, checkpoint_every=3), data=data, stages=(LONG,)), []
    train(replace(cfg, train=replace(cfg.train, checkpoint_keep=9)), corpus, lines.append)
    return cfg, lines


def test_a_run_across_a_boundary(whole, corpus):
    cfg, lines = whole
    records = story(cfg.folder)
    assert [r["step"] for r in records] == list(range(1, 9)) and [r["step"] for r in records if "eval/ce" in r] == [
        4,
        8,
    ]
    assert sorted(int(p.name) for p in Path(cfg.folder, "checkpoints").iterdir()) == [3, 4, 6, 8]
    said = [line for line in lines if "rows of" in line]
    assert "mesh: fsdp 8" in said[0] and "8 rows of 32" in said[0]
    assert said[1].startswith("after step 4: mesh: fsdp 2 x context 4") and "4 rows of 64" in said[1]
    np.testing.assert_allclose([r["learning_rate"] for r in records], rates(cfg), rtol=1e-6)
    # Tokens are counted, not reckoned: those of what the loader gives, in the rows of each stage.
    counted, place = [], None
    for done in (0, 4):
        view = cfg.at(done)
        stream = corpus.of(view.data).train(view.train.batch, view.train.seq_len, 16, 0, 0, 1, place, True)
        counted += [int(next(stream).loss_mask.sum()) for _ in range(4)]
        place = stream.get_state()
        stream.close()
    assert [r["tokens_seen"] for r in records] == np.cumsum(counted).tolist()
    assert [r["tokens"] for r in records] == counted


def test_ended_on_both_sides_it_ends_as_the_unbroken_one(whole, make_staged, corpus):
    cfg = make_staged("broken")
    killed_at(4, cfg, corpus)  # the boundary's checkpoint is not written: from that of step 3
    killed_at(6, cfg, corpus)  # behind it, before that of step 6: from the boundary's
    with Checkpoints(cfg.folder) as checkpoints:
        assert checkpoints.latest == 4
    lines = []
    train(cfg, corpus, lines.append)
    assert any("going on after step 4" in line for line in lines) and not any("after step 4: mesh" in x for x in lines)
    assert story(cfg.folder) == story(whole[0].folder)
    assert_same_weights(cfg.folder, whole[0].folder)


@pytest.mark.slow
def test_a_stage_for_other_devices_is_said_first_and_reached(make_staged, corpus):
    cfg, lines = make_staged(stages=(replace(LONG, mesh=MeshConfig(fsdp=16)),)), []
    with pytest.raises(ValueError, match="16 devices, but there are 8"):
        train(cfg, corpus, lines.append)
    assert "after step 4 comes a mesh of other than the 8 devices here" in lines[0]
    train(replace(cfg, stages=(LONG,)), corpus, lines.append)
    assert story(cfg.folder)[-1]["step"] == 8 and any("going on after step 4" in line for line in lines)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (replace(LONG, batch=3), r"after step 4: train.batch \(3\) must be a multiple of"),
        (replace(LONG, weights={"od": 1.0}), r"after step 4: data.weights names no domain with 'od'"),
        (replace(LONG, sources={"text": "nowhere"}, weights={}), r"nothing at nowhere"),
    ],
)
def test_what_would_fail_later_fails_at_once(make_staged, corpus, stage, message):
    cfg = make_staged(stages=(stage,))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(cfg, corpus, quiet)
    assert not Path(cfg.folder).exists()


# --- A fork


def test_a_fork_of_the_same_config_ends_as_its_source(whole, make_staged, corpus):
    """From the middle of the first stage, the boundary, and the middle of the second."""
    for step in (3, 4, 6):
        cfg, lines = replace(make_staged(f"fork{step}"), fork=f"{whole[0].folder}@{step}"), []
        train(cfg, corpus, lines.append)
        assert story(cfg.folder) == story(whole[0].folder)[step:]
        assert_same_weights(cfg.folder, whole[0].folder)
        assert any(f"a new run in {cfg.folder}, going on after {cfg.fork}" in line for line in lines)
        assert json.loads(Path(cfg.folder, "config.json").read_text())["fork"] == cfg.fork


@pytest.mark.slow
def test_a_fork_may_differ_in_all_but_its_arrays(whole, make_staged, corpus):
    """It is a run of its own, goes on when ended, and says what is different."""
    scout = whole[0].learners["scout"]
    cfg = replace(make_staged("other", stages=(), seq_len=64, seed=1), fork=f"{whole[0].folder}@4")
    cfg = replace(cfg, learners={"scout": replace(scout, optimizer=replace(scout.optimizer, start=4, warmup=2))})
    lines = []
    killed_at(8, cfg, corpus)
    train(cfg, corpus, lines.append)
    records = story(cfg.folder)
    assert [r["step"] for r in records] == [5, 6, 7, 8] and any("going on after step 6" in line for line in lines)
    np.testing.assert_allclose([r["learning_rate"] for r in records[:2]], [5e-3, 1e-2], rtol=1e-6)
    before = story(whole[0].folder)[3]["tokens_seen"]
    assert records[0]["tokens_seen"] == before + records[0]["tokens"]
    with Checkpoints(whole[0].folder) as checkpoints:
        said = fork.differences(cfg, checkpoints.record(4), corpus.tokenizer.hash)
    assert {"train.seed: 0 -> 1", "learners.scout.optimizer.start: 0 -> 4"} <= set(said)
    with pytest.raises(ValueError, match=r"was trained with fork = .*@4', not ''"):
        train(replace(cfg, fork=""), corpus, quiet)


def test_a_fork_that_cannot_be(whole, make_staged, corpus):
    cfg = replace(make_staged(), fork=f"{whole[0].folder}@4")
    scout = cfg.learners["scout"]

    def refused(message: str, **changes) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(replace(cfg, **changes), corpus, quiet)

    wide = replace(scout, model=replace(scout.model, embed_dim=64))
    refused(r"run@4 holds other arrays .* learners\.scout\.model\.embed_dim: 32 -> 64$", learners={"scout": wide})
    muon = replace(scout, optimizer=replace(scout.optimizer, kind="muon"))
    refused(r"learners\.scout\.optimizer\.kind: adamw -> muon$", learners={"scout": muon})
    refused(r"has the learners scout, this run maverick: .* init, run:", learners={"maverick": scout})
    refused(r"run@8 is at or behind the end, train\.steps = 8", fork=f"{whole[0].folder}@8")
    refused(r"no checkpoint of step 5 .* there are: \[3, 4, 6, 8\]; the nearest is 4", fork=f"{whole[0].folder}@5")
    assert not Path(cfg.folder).exists()


def test_finding_where_to_fork(whole, tmp_path):
    folder = whole[0].folder
    assert fork.find(folder) == f"{folder}@8" and fork.find(f"{folder}@3") == f"{folder}@3"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* the nearest is 6"):
        fork.find(f"{folder}@7")
    with pytest.raises(FileNotFoundError, match=rf"no checkpoints in {folder}n; the nearest run is {folder}$"):
        fork.find(f"{folder}n@7")
    with pytest.raises(ValueError, match="takes RUN or RUN@STEP, a step being a whole number"):
        fork.find(f"{folder}@last")
    # A command that is given again means the step it meant at first, though RUN went on.
    (tmp_path / "config.json").write_text(json.dumps({"fork": f"{folder}@4"}))
    assert fork.find(folder, str(tmp_path)) == f"{folder}@4" and fork.find(f"{folder}@3", str(tmp_path))[-2:] == "@3"


# --- The real thing


@pytest.mark.slow
def test_killed_on_both_sides_of_512_to_2048(tmp_path):
    """`pretrain:tiny_long`, shortened, as a command on eight devices: SIGKILL in each stage, and the end is the same.

    fsdp 8 with rows of 512, then fsdp 2 x context 4 with rows of 2,048.
    """
    options = {"train.steps": 20, "stages.0.after": 12, "stages.0.mesh.context": 4, "train.checkpoint-every": 5,
               "train.log-every": 1, "train.eval-batches": 1, "optimizer.warmup": 4}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch.cli", "train", "pretrain:tiny_long", "--out", str(tmp_path / out)]
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.Popen([*command, *words], cwd=Path(__file__).parents[2], env=env,
                                stdout=subprocess.DEVNULL)  # fmt: skip

    def kill_after(step: int) -> None:
        run = start("broken")
        while max((r["step"] for r in read(epath.Path(tmp_path / "broken"))), default=0) < step and run.poll() is None:
            time.sleep(0.01)
        run.kill()
        assert run.wait() == -signal.SIGKILL

    assert start("whole").wait() == 0
    kill_after(8)
    kill_after(16)
    assert start("broken").wait() == 0
    records = story(tmp_path / "whole")
    assert story(tmp_path / "broken") == records and [r["step"] for r in records] == list(range(1, 21))
    assert {r["step"] for r in records if "eval/ce" in r} == {12, 20}
    assert_same_weights(str(tmp_path / "broken"), str(tmp_path / "whole"))
