"""Scripts that start processes (local, mpi, sky, tpu-vm): what they make of a failure, and of being told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.render import local, mpi, sky, tpu_vm
from launch.render.job import JobSpec

PROGRAM = """#!/bin/bash
if [ "$3" = --complete ]; then exit 1; fi
if [ "$1" = status ]; then exit $(cat again); fi
echo "rank $JAX_PROCESS_ID" >> started
{body}
"""


def script(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, again: int, restarts: int = 2) -> Path:
    monkeypatch.setattr(local, "LAST_WORDS", 0.2)
    (folder / "program").write_text(PROGRAM.format(body=body))
    (folder / "program").chmod(0o755)
    (folder / "again").write_text(f"{again}\n")
    (folder / "job").write_text(
        local.render(JobSpec("a", ("train",), str(folder / "run"), processes=2, program=str(folder / "program"),
                             workdir=str(folder), restarts=restarts)).text)  # fmt: skip
    return folder / "job"


def starts(folder: Path) -> int:
    return len((folder / "started").read_text().splitlines())


def test_a_failure_ends_all_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = script(tmp_path, monkeypatch, '[ "$JAX_PROCESS_ID" = 0 ] && exec sleep 60; exit 2', again=1)
    began = time.monotonic()
    assert subprocess.run(["bash", job]).returncode == 1
    assert time.monotonic() - began < 30 and starts(tmp_path) == 2


def test_what_may_pass_is_tried_again_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = script(tmp_path, monkeypatch, "exit 70", again=0)
    assert subprocess.run(["bash", job]).returncode == 1
    assert starts(tmp_path) == 2 * 3
    (tmp_path / "started").unlink()
    job = script(tmp_path, monkeypatch, '[ "$(wc -l < started)" -gt 2 ] || exit 70', again=0)
    assert subprocess.run(["bash", job]).returncode == 0


HEARS = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""


def running(folder: Path, job: Path, *more: str) -> subprocess.Popen[bytes]:
    """The script in a session of its own, once its processes are there and have set their traps. It hears SIGINT, which
    what runs in the background ignores."""
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "a"}
    made = subprocess.Popen([sys.executable, "-c", HEARS, job, *more], env=env, cwd=folder, start_new_session=True)
    while not (folder / "started").exists() or starts(folder) < 2:
        assert made.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    return made


def test_told_to_stop_it_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = "trap 'echo told >> told; exit 75' TERM; while :; do sleep 0.1; done"
    job = running(tmp_path, script(tmp_path, monkeypatch, body, again=0))
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "told").read_text() == "told\ntold\n" and starts(tmp_path) == 2


COUNTS = """exec python3 -c '
import signal, time
def told(*_):
    print("told", file=open("told", "a"))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, told)
print("ready", file=open("ready", "a"))
until = time.monotonic() + 3
while time.monotonic() < until:
    time.sleep(0.1)
raise SystemExit(75)
'"""


def ready(folder: Path, count: int) -> None:
    while not (folder / "ready").exists() or len((folder / "ready").read_text().splitlines()) < count:
        time.sleep(0.05)


def test_a_terminals_ctrl_c_is_heard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It goes to the whole group; a second signal would end the processes without a checkpoint."""
    job = running(tmp_path, script(tmp_path, monkeypatch, COUNTS, again=0))
    ready(tmp_path, 2)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "told").read_text() == "told\ntold\n" and starts(tmp_path) == 2


def test_told_to_stop_between_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job_file = script(tmp_path, monkeypatch, "exit 70", again=0)
    (tmp_path / "again").unlink()
    os.mkfifo(tmp_path / "again")
    job = subprocess.Popen(["bash", job_file])
    with (tmp_path / "again").open("w") as answer:  # opens once the script asks
        os.kill(job.pid, signal.SIGTERM)
        answer.write("0\n")
    assert job.wait(timeout=60) == 1 and starts(tmp_path) == 2


@pytest.mark.parametrize("how", ["script", "group"])
def test_mpi_told_to_stop_is_not_started_again(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a stub in place of mpirun, which is told once, and waited for; by SIGUSR2, which it hands on at once."""
    script(tmp_path, monkeypatch, "", again=0)
    by_usr2 = COUNTS.replace('print("told"', 'print("told", _[0]')
    (tmp_path / "mpirun").write_text(f"#!/bin/bash\nprintf 'a\\na\\n' >> started\n{by_usr2}\n")
    (tmp_path / "mpirun").chmod(0o755)
    spec = JobSpec("a", ("train",), str(tmp_path / "run"), processes=2, program=str(tmp_path / "program"))
    (tmp_path / "job").write_text(mpi.render(spec).text)
    job = running(tmp_path, tmp_path / "job")
    ready(tmp_path, 1)
    (os.kill if how == "script" else os.killpg)(job.pid, signal.SIGTERM if how == "script" else signal.SIGINT)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "told").read_text() == f"told {int(signal.SIGUSR2)}\n" and starts(tmp_path) == 2


GCLOUD = """#!/bin/bash
case "$*" in
  *describe*) echo READY;;
  *"--command=pkill "*) echo "$*" >> pkilled; kill -TERM "$(cat remote)";;
  *" ssh "*) for w; do last=$w; done; echo $$ > remote; exec setsid bash -c "${last#--command=}";;
  *) exit 1;;
esac
"""


@pytest.mark.parametrize("how", ["script", "group"])
def test_the_workers_of_a_slice_are_told(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They do not hear the terminal of who started them, and are waited for; nothing is started again."""
    counts = COUNTS.replace('ready"', 'started"')
    script(tmp_path, monkeypatch, f"echo worker >> started\n{counts}", again=0)
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    spec = JobSpec("a", ("train",), str(tmp_path / "run"), "v5p:4x4x4", 16, devices=4, zone="z",
                   workdir=str(tmp_path), program=str(tmp_path / "program"))  # fmt: skip
    (tmp_path / "job").write_text(tpu_vm.render(spec).text)
    job = running(tmp_path, tmp_path / "job")
    before = starts(tmp_path)
    (os.kill if how == "script" else os.killpg)(job.pid, signal.SIGTERM if how == "script" else signal.SIGINT)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "told").read_text() == "told\n" and starts(tmp_path) == before
    assert len((tmp_path / "pkilled").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "status, again, ends", [(2, 1, 2), (1, 1, 1), (70, 0, 75), (137, 0, 75), (75, 0, 75), (75, 1, 1), (0, 1, 0)]
)
def test_a_node_of_sky_ends_with_75_to_be_started_again(status: int, again: int, ends: int, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    """SkyPilot starts a job again after that status alone, and as often as it comes: a node answers for the bound."""
    script(tmp_path, monkeypatch, f"exit {status}", again)
    spec = JobSpec("a", ("train",), str(tmp_path / "run"), program=str(tmp_path / "program"), restarts=4)
    task = yaml.safe_load(sky.render(spec).text)
    assert task["resources"]["job_recovery"] | {"strategy": ""} == {
        "strategy": "", "max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}  # fmt: skip
    env = os.environ | {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "a"}
    assert subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path).returncode == ends
    assert "--restart --most 4 --since" in task["run"]


def test_a_node_of_sky_waits_for_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Told to stop, they need time for a checkpoint, of which nothing is left once the script has ended."""
    body = "trap 'sleep 1; echo saved >> saved; exit 75' TERM; while :; do sleep 0.1; done"
    script(tmp_path, monkeypatch, body, again=0)
    spec = JobSpec("a", ("train",), str(tmp_path / "run"), processes=2, program=str(tmp_path / "program"))
    (tmp_path / "job").write_text(yaml.safe_load(sky.render(spec).text)["run"])
    job = running(tmp_path, tmp_path / "job")
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"
