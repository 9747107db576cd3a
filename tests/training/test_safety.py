"""Bad steps, stuck processes, two writers, broken-off evaluations, wrong bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from tools import chaos_run
from training import evaluate, loop, recheck, status
from training.checkpoint import Checkpoints
from training.config import SafetyConfig, Stage
from training.guard import Guard, documents
from training.lock import Lease, RunLock
from training.loop import train
from training.metrics import read
from training.reporter import Kept

ROOT = Path(__file__).resolve().parents[2]


def story(cfg) -> list[dict]:
    return chaos_run.story(Path(cfg.folder))


# --- Judging


def judge(guard: Guard, *losses: float) -> list[str | None]:
    return [guard.judge({"a": loss}, {"a": bool(np.isfinite(loss))}) for loss in losses]


def test_noise_and_falling_losses_pass_and_a_jump_does_not():
    rng = np.random.default_rng(0)
    guard = Guard(SafetyConfig())
    falling = 10 * np.exp(-np.arange(300) / 100) + rng.normal(0, 0.1, 300)
    assert judge(guard, *falling) == [None] * 300
    assert judge(guard, falling[-1] + 0.5) == [None]
    (why,) = judge(guard, 10 * falling[-1])
    assert why is not None and why.startswith("a: loss ") and "the median before it was 0.66" in why


def test_a_few_losses_say_nothing_and_the_check_can_be_left_out():
    assert judge(Guard(SafetyConfig()), *[1.0] * 15, 100.0) == [None] * 16
    assert judge(Guard(SafetyConfig(spike=0.0)), *[1.0] * 40, 100.0)[-1] is None
    assert judge(Guard(SafetyConfig()), *[1.0] * 16, 1.19, 1.21)[-2:][0] is None  # 2% of the median is a deviation


def test_skipped_steps_count_and_three_in_a_row_are_too_many():
    guard = Guard(SafetyConfig())
    nan = float("nan")
    assert judge(guard, nan, nan, 1.0, nan, nan) == [None] * 5
    assert judge(guard, nan)[0] == "a: loss or gradient not finite, 3 steps in a row"
    assert guard.skipped == 5 and guard.losses == {"a": [1.0]}


def test_a_guard_goes_on_from_json():
    losses = [5.0 - 0.01 * i for i in range(40)]
    whole = Guard(SafetyConfig())
    judge(whole, *losses)
    half = Guard(SafetyConfig())
    judge(half, *losses[:17])
    half = Guard(SafetyConfig(), json.loads(json.dumps(half.state())))
    judge(half, *losses[17:])
    assert half.state() == whole.state() and half.threshold("a") == whole.threshold("a")


def test_documents_of_a_batch(corpus):
    stream = corpus.train(8, 32, 16, 0)
    batch = next(stream)
    stream.close()
    of = documents(batch, corpus.domains)
    valid = batch.segment_ids > 0
    assert set(of) <= {"even", "odd"}
    assert {(name, i) for name, ids in of.items() for i in ids} == {
        (corpus.domains[d], int(i)) for d, i in zip(batch.domain[valid], batch.document_id[valid], strict=True)
    }


# --- Runs with bad steps


@pytest.fixture
def marked(monkeypatch):
    """Puts trouble on some batches of a run."""

    def mark(cfg, corpus, **kinds: list[range]) -> None:
        monkeypatch.setattr(loop, "put_local", loop.put_local)
        monkeypatch.setattr(chaos_run.step, "gradient", chaos_run.step.gradient)
        chaos_run._mark(kinds, cfg, corpus)

    return mark


def test_a_step_that_is_not_finite_changes_nothing_and_three_go_back(make_run, corpus, marked):
    """Batches 3 and 5 to 7 are bad: step 3 is left out; after step 7 the run goes back to 6 and on with batch 8."""
    cfg = make_run(checkpoint_every=2, steps=10)
    marked(cfg, corpus, nan=[range(3, 4), range(5, 8)])
    lines = []
    train(cfg, corpus, lines.append)
    assert any("step 3: scout: loss or gradient not finite; left as it was; documents" in line for line in lines)
    (back,) = [line for line in lines if "going back" in line]
    assert back.startswith("going back from step 7 to the checkpoint of step 6; the data of steps 7 to 7 is left out")
    records = story(cfg)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["step"] for r in records if "grad_norm" not in r] == [3, 5, 6]
    assert [r.get("skipped_steps", 0) for r in records] == [0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
    events = [json.loads(f.read_text()) for f in sorted((Path(cfg.folder) / "bad_steps").iterdir())]
    assert [e["step"] for e in events] == [3, 5, 6, 7] and all(e["documents"] for e in events)
    with Checkpoints(cfg.folder) as checkpoints:
        place = checkpoints.place(10)
        assert place["guard"]["rollbacks"] == 1 and checkpoints.steps == [8, 10]


def test_a_run_that_always_comes_back_to_one_checkpoint_ends(make_run, corpus, marked):
    """No batch behind the third is good: none of the times that the run goes back is forgotten."""
    cfg, lines = make_run(checkpoint_every=4, steps=20), []
    marked(cfg, corpus, nan=[range(3, 10**6)])
    with pytest.raises(FloatingPointError, match=r"went back 3 times already, safety\.rollbacks allows no more"):
        train(cfg, corpus, lines.append)
    back = [line for line in lines if "going back" in line]
    assert [line.rpartition(" (")[2] for line in back] == [f"{n} of 3 times)" for n in (1, 2, 3)]


@pytest.mark.slow
def test_a_skipped_step_leaves_moments_and_weights(make_run, corpus, marked):
    cfg = make_run(checkpoint_every=1, steps=3)
    marked(cfg, corpus, nan=[range(3, 4)])
    train(cfg, corpus, lambda _: None)
    from training.compare import differences

    found = differences((cfg.folder, 2), (cfg.folder, 3))
    assert list(found["arrays"]) == ["step"]


def test_evaluations_that_are_broken_off_are_made_up_for(make_run, corpus, monkeypatch):
    """A signal in an evaluation, at a step and at the last one, ends it with a checkpoint; the story is the same, and
    so it is where the start that made up for one is killed before its next checkpoint."""
    whole, cfg = make_run("whole"), make_run("broken", checkpoint_every=3)
    train(whole, corpus, lambda _: None)
    real, calls = evaluate.HeldOut.__call__, []

    def told(self, state, go_on):
        """The first is that of step 4, which two starts then make up for; the fourth that of step 8."""
        calls.append(1)
        if len(calls) in (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, go_on)

    def killed(self, pending):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.HeldOut, "__call__", told)
    for step in (4, 8):
        if step == 8:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(loop.Reporter, "begin", killed)
                train(cfg, corpus, lambda _: None)
        summary = train(cfg, corpus, lambda _: None)
        assert (summary["step"], summary["signal"]) == (step, signal.SIGTERM)
        assert len([r for r in story(cfg) if "eval/ce" in r]) == step // 4 - 1
        assert (Path(cfg.folder) / "requeue.json").exists() and status.read(cfg.folder)["state"] == "stopped"
    assert train(cfg, corpus, lambda _: None)["complete"]
    assert story(cfg) == story(whole) and not (Path(cfg.folder) / "requeue.json").exists()
    assert train(cfg, corpus, lambda _: None)["complete"] and len(calls) == 5, "it is made up for once"
    assert story(cfg) == story(whole)


def test_what_a_stage_and_a_fork_are_judged_by(make_run):
    """Losses of other rows are no measure, those of the same are; a fork has neither bad steps nor debts."""
    guard = dict(losses={"scout": [3.0] * 20}, skipped=4, in_a_row=1, rollbacks=3)
    place = dict(tokens_seen=100, domain_tokens={"even": 100}, guard=guard, owed={"loss": 3.0}, row=5)
    cfg = replace(make_run(), stages=(Stage(2, microbatches=2), Stage(4, seq_len=16), Stage(6, weights={"even": 1.0})))
    for start in (1, 2, 3, 5):
        assert loop._kept(cfg, start, place, False).guard == guard
    for start in (4, 6):
        kept = loop._kept(cfg, start, place, False)
        assert kept.guard == guard | {"losses": {}} and kept.owed and kept.tokens_seen == 100
    assert loop._kept(cfg, 4, place, True) == Kept(100, {"even": 100})


@pytest.mark.slow
def test_a_step_that_gives_other_bits_is_named(make_run, corpus, monkeypatch):
    cfg = replace(make_run(steps=3), safety=SafetyConfig(recheck_every=2))
    real, calls = recheck.rechecked, []

    def wrong(train_step):
        def once(state, batch, targets):
            state, metrics = train_step(state, batch, targets)
            calls.append(1)
            if len(calls) == 2:
                learner = state.learners["scout"]
                bump = jax.tree.map(lambda x: x + 1e-7 * (x.ndim > 2), learner.params)
                state = state._replace(learners={"scout": learner._replace(params=bump)})
            return state, metrics

        return real(once)

    monkeypatch.setattr(loop, "rechecked", wrong)
    with pytest.raises(recheck.OtherBits, match=r"step 2 gave other bits .*learners\.scout\.params\..* on cpu:0"):
        train(cfg, corpus, lambda _: None)
    monkeypatch.setattr(loop, "rechecked", real)
    again = replace(cfg, out=cfg.out + "2")
    assert train(again, corpus, lambda _: None)["complete"], "nothing is wrong, and nothing is said"


# --- One writer, and none that is stuck


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    folder = epath.Path(tmp_path / "run")
    program = (
        "from training.lock import RunLock; from etils import epath\n"
        f"with RunLock(epath.Path({str(folder)!r})):\n print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    with (
        pytest.raises(BlockingIOError, match=rf"is being written by process {process.pid} on .*: wait for it"),
        RunLock(folder),
    ):
        pass
    process.kill()
    process.communicate()
    with RunLock(folder):
        pass


def test_a_lease_runs_out(tmp_path, monkeypatch):
    """Where there are no file locks."""
    monkeypatch.setattr("training.lock.SETTLES", 0.0)
    folder = epath.Path(tmp_path)
    first = Lease(folder)
    with pytest.raises(BlockingIOError, match="is being written by process"):
        Lease(folder)
    first.release()
    Lease(folder)._done.set()  # dies, and leaves its lease behind
    (folder / "lease.json").write_text(json.dumps(json.loads((folder / "lease.json").read_text()) | {"until": 0.0}))
    Lease(folder).release()


def test_a_lease_outlives_a_hiccup(tmp_path, monkeypatch):
    """A renewal that fails does not end the renewing, and none comes after the release."""
    monkeypatch.setattr("training.lock.SETTLES", 0.0)
    monkeypatch.setattr("training.lock.LASTS", 60.0)
    monkeypatch.setattr("training.lock.RENEWALS", 6000)
    real, calls, again = Lease._write, [], threading.Event()

    def write(self):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "a hiccup")
        if len(calls) > 3:
            again.set()
        return real(self)

    monkeypatch.setattr(Lease, "_write", write)
    lease = Lease(epath.Path(tmp_path))
    assert again.wait(20)
    lease.release()
    assert not (tmp_path / "lease.json").exists() and not lease._keeper.is_alive()


def test_a_lease_that_ran_out_in_a_pause_is_taken_anew_or_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("training.lock.SETTLES", 0.0)
    folder, file = epath.Path(tmp_path), tmp_path / "lease.json"
    lease = Lease(folder)
    lease.check()
    lease._until = 0.0  # paused; nobody came
    lease.check()
    assert lease._until > 0 and json.loads(file.read_text())["id"] == lease._id
    lease._until = 0.0
    file.write_text(json.dumps(json.loads(file.read_text()) | {"until": 0.0}))
    other = Lease(folder)
    with pytest.raises(BlockingIOError, match="is being written by process"):
        lease.check()
    lease.release()
    assert json.loads(file.read_text())["id"] == other._id  # it is theirs
    other.release()
    assert not file.exists()


def test_a_run_whose_lease_was_taken_writes_nothing_more(make_run, corpus, monkeypatch):
    """At the next step; the checkpoint under way then gets no manifest either."""
    cfg, taken = make_run(checkpoint_every=2), []

    def check(self):
        if taken:
            raise BlockingIOError("it is another's by now")

    monkeypatch.setattr(RunLock, "check", check)
    real = loop.Reporter.begin

    def begin(self, pending):
        if pending.step == 5:
            taken.append(1)
        real(self, pending)

    monkeypatch.setattr(loop.Reporter, "begin", begin)
    with pytest.raises(BlockingIOError, match="another's"):
        train(cfg, corpus, lambda _: None)
    assert max(r["step"] for r in story(cfg)) == 4
    assert 2 in status.read(cfg.folder)["saved"] and max(status.read(cfg.folder)["saved"]) <= 4


def test_of_two_starts_into_one_new_folder_the_second_leaves_the_first_ones_run(make_run, corpus, monkeypatch):
    """It began before there was anything to go on with, and comes to the folder when there is."""
    cfg = make_run()
    real = loop._look_ahead

    def meanwhile(*args):
        monkeypatch.setattr(loop, "_look_ahead", real)
        train(cfg, corpus, lambda _: None)
        return real(*args)

    monkeypatch.setattr(loop, "_look_ahead", meanwhile)
    with pytest.raises(BlockingIOError, match=r"while this run began, another one wrote .* up to step 8: the same "):
        train(cfg, corpus, lambda _: None)
    assert [r["step"] for r in story(cfg)] == list(range(1, 9))


def test_records_that_are_none_are_left_out_by_all_readers(tmp_path):
    lines = [b'{"step": 1}', b"\x00\xff", b'{"step": "2"}', b"[" * 100_000, b"3", b'{"step": 4}', b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "config.json").write_text("{}")
    assert [r["step"] for r in read(epath.Path(tmp_path))] == [1, 4]
    assert status.read(str(tmp_path))["step"] == 4


def test_a_student_keeps_its_teacher():
    """By student, or, in checkpoints of before, by the targets' place, which may have moved."""
    check = loop._check_teachers
    check({}, {"a": "1"})
    check({"a": "1"}, {"a": "1", "b": "2"})
    check({"a": "1", "b": "2"}, {"b": "2"})
    check({"targets:x": "1", "targets:y": "2"}, {"b": "2", "a": "1"})
    for before in ({"a": "1", "b": "2"}, {"targets:x": "1"}):
        with pytest.raises(ValueError, match="a has learned from the teacher 1, but now there are targets of 2: give"):
            check(before, {"a": "2"})


STUCK = """
import sys, time, jax
from etils import epath
from training.watchdog import Watchdog
with Watchdog(epath.Path(sys.argv[1]), 1) as dog:
    dog.beat(7, "making a step")
    def frozen(): time.sleep(60)
    frozen()
"""


def test_a_process_that_is_stuck_ends_whatever_lies_among_the_heartbeats(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "1.json").write_text('{"process": 1}')
    done = subprocess.run([sys.executable, "-c", STUCK, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 70


def test_a_process_that_is_stuck_shows_its_stacks_and_ends(tmp_path):
    done = subprocess.run([sys.executable, "-c", STUCK, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 70
    assert "nothing for" in done.stderr and "while making a step after step 7" in done.stderr
    assert "in frozen" in done.stderr and "process 0 on" in done.stderr
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["step"] == 7


def test_a_run_directory_that_cannot_be_written_is_named(make_run, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = replace(make_run(), out=str(tmp_path / "file" / "run"))
    with pytest.raises(OSError, match=r"file/run cannot be written"):
        train(cfg, corpus, lambda _: None)
    assert read(epath.Path(tmp_path)) == []
