"""Where a run's time went, told by its records and starts; traces, trackers; what a folder says of its run."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from launch import cli
from training import board, goodput, profile, status, trackers
from training.page import page

WHOLE = dict(compile=0.0, save=0.0, restore=0.0, evaluate=0.0)


def record(step: int, time: float, seconds: float = 2.0, wait: float = 0.25, **spent: float) -> dict:
    rates = {} if step == 1 else dict(seconds_per_step=seconds, data_wait=wait)
    return dict(step=step, time=time, loss=3.0, **rates) | {f"seconds/{n}": x for n, x in (WHOLE | spent).items()}


def test_an_unbroken_run_is_accounted_for():
    records = [
        record(1, 130.0, compile=20.0),
        record(11, 150.0, compile=20.0),
        record(21, 180.0, compile=20.0, save=7.0, evaluate=2.0),
    ]
    seconds = goodput.account(records, [dict(time=100.0)])
    assert seconds == pytest.approx(
        dict(steps=30, data=10, start=10, compile=20, restore=0, evaluate=2, save=7, other=1, restart=0)
    )
    assert sum(seconds.values()) == pytest.approx(80) and goodput.goodput(seconds) == pytest.approx(30 / 80)


def test_what_a_restart_costs():
    """Steps 12 to 20 were made twice: the first time is no goodput, since the records of it are gone."""
    records = [
        record(1, 130.0, compile=20.0),
        record(11, 150.0, compile=20.0),
        record(21, 330.0, compile=5.0, restore=3.0),
    ]
    seconds = goodput.account(records, [dict(time=100.0), dict(time=300.0)])
    assert seconds["restart"] == pytest.approx(150) and seconds["steps"] == pytest.approx(30)
    assert seconds["start"] == pytest.approx(10 + 30 - 20 - 5 - 3) and sum(seconds.values()) == pytest.approx(230)


def test_what_cannot_be_accounted_for_is_not_made_up():
    assert goodput.account([], [dict(time=1.0)]) == {} == goodput.account([dict(step=1, time=3.0)], [dict(time=1.0)])
    assert goodput.account([record(1, 3.0)], []) == {} and goodput.goodput({"steps": 0.0}) is None


def test_compiling_inside_of_saving_is_compiling():
    """No second is counted twice: what was counted in all is at most what went by."""
    before, began = dict(goodput.SPENT), time.perf_counter()
    with goodput.spent("save"):
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.arange(7.0)).block_until_ready()
    passed = time.perf_counter() - began
    compiled, saved = (goodput.SPENT[what] - before[what] for what in ("compile", "save"))
    assert compiled > 0 and saved >= 0 and compiled + saved <= passed


# --- What a folder says


def run(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        lines = content if isinstance(content, list) else [content]
        suffix = "jsonl" if isinstance(content, list) else "json"
        (folder / f"{name}.{suffix}").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


CONFIG = dict(name="a", train=dict(steps=20), learners={"scout": {}})


def test_states(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        status.read(str(tmp_path))
    run(
        tmp_path,
        config=CONFIG,
        starts=[dict(time=1000.0, how="slurm", hosts=["n1", "n2"])],
        metrics=[record(1, 1010.0)],
    )
    found = status.read(str(tmp_path))
    assert status.state(found, now=1100.0) == "running" and status.state(found, now=5000.0) == "silent"
    assert status.restart(found) == (True, "a process died")
    run(tmp_path, requeue=dict(step=1, signal="SIGTERM", time=1020.0))
    assert status.read(str(tmp_path))["state"] == "stopped" and status.restart(status.read(str(tmp_path)))[0]
    status.refuse(str(tmp_path), "rank 1 (n2)", ValueError("wrong\ninput"))
    assert status.restart(status.read(str(tmp_path))) == (False, "it would fail again: wrong input")
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert status.read(str(tmp_path))["state"] == "refused", "a save that was broken off is no checkpoint"
    (tmp_path / "checkpoints" / "20" / "manifest.json").write_text("{}")
    (tmp_path / status.REFUSED).unlink()
    assert status.read(str(tmp_path))["state"] == "stopped" and status.restart(status.read(str(tmp_path)))[0]
    run(tmp_path, metrics=[record(20, 1030.0)])
    assert status.read(str(tmp_path))["state"] == "complete" and not status.restart(status.read(str(tmp_path)))[0]


def test_a_start_takes_back_what_was_refused(tmp_path: Path):
    status.refuse(str(tmp_path), "rank 0", ValueError("x"))
    status.begin(str(tmp_path), dict(how="mpi", hosts=["a"]))
    status.begin(str(tmp_path), dict(how="mpi", hosts=["a"]))
    found = status.read(str(tmp_path))
    assert found["refused"] is None and len(found["starts"]) == 2


def test_the_board_of_a_run(tmp_path: Path):
    """A page that loads itself again while the run goes on, and escapes what it is told."""
    records = [record(1, 1010.0, compile=3.0), record(11, 1040.0, compile=3.0)]
    run(
        tmp_path,
        config=CONFIG,
        metrics=records,
        starts=[dict(time=1000.0, how="slurm", hosts=["<b>n1</b>", "n2"], job="7")],
    )
    html = board.build(status.read(str(tmp_path)), refresh=30)
    assert (
        '<meta http-equiv="refresh" content="30">' in html and "&lt;b&gt;n1&lt;/b&gt;" in html and "<b>n1" not in html
    )
    assert re.search(r"goodput \d+\.\d%", html) and "Hosts and starts" in html and "11 of 20" in html
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "0.json").write_text(json.dumps(dict(process=0, host="n1", step=11, time=1040.0)))
    assert "heard of, ago" in board.build(status.read(str(tmp_path)))
    status.refuse(str(tmp_path), "rank 1 (n2)", ValueError("a <script>"))
    board.write(str(tmp_path), 30)
    html = (tmp_path / "board.html").read_text()
    assert "heard of, ago" not in html and "a &lt;script&gt;" in html and 'content="30"' in html, "it may go on"
    complete = run(tmp_path, metrics=[record(20, 1050.0)]) / "checkpoints" / "20"
    complete.mkdir(parents=True)
    (complete / "manifest.json").write_text("{}")
    board.write(str(tmp_path), 30)
    assert "refresh" not in (tmp_path / "board.html").read_text() and "refresh" not in page("a", [], [])


def test_the_board_of_a_stopped_run_sees_it_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    run(tmp_path, config=CONFIG, starts=[dict(time=1000.0, how="local")], metrics=[record(7, 1010.0)],
        requeue=dict(step=7, signal="SIGTERM", time=1020.0))  # fmt: skip

    def later(_: float, ends: list[str] = ["stopped", "running", "complete"]):  # noqa: B006
        match ends.pop(0):
            case "running":
                (tmp_path / "requeue.json").unlink()
                run(tmp_path, metrics=[record(8, time.time())])
            case "complete":
                (tmp_path / "checkpoints" / "20").mkdir(parents=True)
                (tmp_path / "checkpoints" / "20" / "manifest.json").write_text("{}")

    monkeypatch.setattr("launch.board.time.sleep", later)
    assert cli.main(["board", str(tmp_path)]) == 0
    states = [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["stopped", "running", "complete"]


def test_what_was_refused_before_is_of_another_start(tmp_path: Path):
    """A start that was refused says nothing of the next one; one that is counted begins at most so often."""
    started = time.time() - 500
    run(tmp_path, config=CONFIG, starts=[dict(time=started, how="explicit", job="7")], metrics=[record(7, started)])
    status.refuse(str(tmp_path), "rank 0", ValueError("x"))
    found = status.read(str(tmp_path))
    assert not status.restart(found)[0] and not status.restart(found, time.time() - 10)[0]
    assert status.restart(found, time.time() + 100) == (True, "a process died")
    (tmp_path / status.REFUSED).unlink()
    found = status.read(str(tmp_path))
    assert status.restart(found, started - 5, most=1, job="7")[0]
    assert status.restart(found, started - 5, most=0, job="7") == (False, "it was started 1 time")
    for since, job in ((started + 400, "7"), (started - 5, "8")):
        assert status.restart(found, since, most=1, job=job) == (False, "this start did not begin: its log says why")


def test_a_board_before_the_first_record(tmp_path: Path):
    run(tmp_path, starts=[dict(time=1000.0, how="local", hosts=["a"])])
    assert "No step is recorded yet" in board.build(status.read(str(tmp_path)))


def test_each_run_of_a_process_has_its_own_account():
    goodput.begin()
    with goodput.spent("save"):
        sum(range(100_000))
    assert goodput.counted()["seconds/save"] > 0
    goodput.begin()
    assert not any(goodput.counted().values())


# --- Traces


def test_steps_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    said, handler = [], signal.getsignal(signal.SIGUSR1)
    with profile.Profiler(str(tmp_path), 2, 3, said.append) as profiler:
        for step in range(1, 5):
            jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
            profile.after(step)
        assert len(said) == 1 and "steps 2 to 3 are traced" in said[0]
        profiler._ask()
        for step in range(5, 9):
            profile.after(step)
    assert "steps 6 to 8 are traced" in said[1]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2
    assert not list((tmp_path / "scratch").glob("llama4-*")) and signal.getsignal(signal.SIGUSR1) == handler


@pytest.mark.parametrize("asked", ["10-12", "steps=", "steps=3-2", "steps=0", "steps=a"])
def test_wrong_traces_are_refused(asked: str):
    with pytest.raises(ValueError, match="--profile takes steps=FIRST-LAST"):
        profile.parse(asked)
    assert profile.parse("steps=10-12") == (10, 12) and profile.parse("steps=4") == (4, 4)


# --- Trackers


class Fake(types.ModuleType):
    """A tracker's module, which notes what it is told."""

    def __init__(self, name: str, fails: bool = False):
        super().__init__(name)
        self.told: list[tuple] = []
        self.fails = fails

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self.told.append((name, arguments, named))
            if self.fails and name.startswith("log"):
                raise OSError("no network")
            return [] if name == "search_runs" else self

        return call


@pytest.mark.parametrize("kind, logs", [("trackio", "log"), ("wandb", "log"), ("mlflow", "log_metrics")])
def test_trackers_get_the_scalars(kind: str, logs: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, kind, module := Fake(kind))
    tracker = trackers.start(f"{kind}:project", "run", {"a": 1})
    tracker.log(3, {"eval/ce/my domain": 2.5})
    tracker.finish()
    name = "eval/ce/my-domain" if kind == "mlflow" else "eval/ce/my domain"
    assert (logs, ({name: 2.5},), {"step": 3}) in module.told
    assert any("project" in arguments or named.get("project") == "project" for _, arguments, named in module.told)


def test_a_tracker_that_fails_is_spoken_of_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", Fake("trackio", fails=True))
    said: list[str] = []
    tracker = trackers.start("trackio", "run", {}, said.append)
    tracker.log(1, {})
    tracker.log(2, {})
    tracker.finish()
    assert said == ["trackio failed, and the run goes on: no network"]


def test_a_tracker_that_does_not_start_is_done_without(monkeypatch: pytest.MonkeyPatch):
    def init(**_: object):
        raise SystemExit("not logged in,\nhf_" + "a" * 34)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    said: list[str] = []
    tracker = trackers.start("wandb", "run", {}, said.append)
    tracker.log(1, {})
    tracker.finish()
    assert len(said) == 1 and said[0].startswith("wandb did not start, and the run goes on without it: not logged in,")
    assert "aaaa" not in said[0]


def test_a_tracker_that_hangs_holds_up_nothing(monkeypatch: pytest.MonkeyPatch):
    hangs, said = threading.Event(), []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: hangs.wait() and Fake("run")))
    monkeypatch.setattr(trackers, "LAST", 0.05)
    tracker = trackers.start("wandb", "run", {}, said.append)
    for step in range(trackers.BEHIND + 2):
        tracker.log(step, {})
    tracker.finish()
    hangs.set()
    assert [line.split(",")[0] for line in said] == ["wandb is 1", "wandb did not take what it was told within 0 s; "
                                                     "it may lack the last records"]  # fmt: skip


def test_unknown_and_missing_trackers(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="--track takes trackio, wandb, mlflow"):
        trackers.start("neptune", "run", {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=re.escape("pip install -e '.[wandb]'")):
        trackers.start("wandb", "run", {})
