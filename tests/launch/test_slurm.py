"""A real SLURM of two nodes on this machine: `make test-slurm`, as root, with Debian's slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import QUICK, losses, options, program
from support import ROOT

from launch import cli

pytestmark = pytest.mark.skipif(
    os.environ.get("LLAMA4_TEST_SLURM") != "1", reason="real SLURM is what make test-slurm runs"
)
NODES = "127.0.0.1 n1 n2  # nodes of a test's SLURM"
STEPS = 30


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A controller and two nodes, started in a folder and stopped by their pids; /etc/hosts knows the nodes."""
    assert shutil.which("slurmctld"), "slurm-wlm is not installed: make test-slurm"
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname()
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=60
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=17000
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=8 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    started: list[int] = []
    before = Path("/etc/hosts").read_text()
    Path("/etc/hosts").write_text(f"{before.rstrip()}\n{NODES}\n")
    try:
        if not Path("/run/munge/munge.socket.2").exists():
            subprocess.run(["install", "-d", "-o", "munge", "/run/munge"], check=True)
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
            started.append(int(Path("/run/munge/munged.pid").read_text()))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        subprocess.run(["slurmctld"], check=True)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node], check=True)
        started += [pid for name in ("slurmd-n1", "slurmd-n2", "slurmctld") if (pid := _pid(folder / f"{name}.pid"))]
        until(lambda: _idle() == 2, 60, "two nodes are idle")
        yield folder
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(2)
        for pid in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        Path("/etc/hosts").write_text(before)
        os.environ.pop("SLURM_CONF", None)


def _pid(file: Path) -> int:
    until(lambda: file.exists() and file.read_text().strip() != "", 20, f"{file.name} is written")
    return int(file.read_text())


def _idle() -> int:
    return subprocess.run(["sinfo", "-hN", "-o", "%T"], capture_output=True, text=True).stdout.split().count("idle")


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def rendered(folder: Path, name: str, capsys: pytest.CaptureFixture[str], target: str = "slurm", *more: str) -> Path:
    """The file of a run `name` of four processes, on two nodes where there are some."""
    size = ["--hosts", "2", "--processes", "2"] if target == "slurm" else ["--processes", "4"]
    words = [target, "pretrain:tiny", *size, *options(folder, STEPS), "--train.checkpoint-every", "5", "--out",
             str(folder / name), "--program", str(program(folder)), "--workdir", str(folder),
             "--env", f"XLA_FLAGS={QUICK}",
             "--grace", "60", "--hours", "1", *more]  # fmt: skip
    assert cli.main(["launch", *words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    file = folder / Path(made["file"]).name
    file.write_text(made["text"])
    return file


def clean() -> dict[str, str]:
    """Without the XLA_FLAGS of these tests' own processes, which would win over the job's."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def submit(file: Path) -> str:
    done = subprocess.run(["sbatch", file], cwd=file.parent, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def field(job: str, name: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return found[1] if (found := re.search(rf"\b{name}=(\S+)", shown)) else "gone"


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def log(folder: Path, name: str, job: str) -> str:
    return (folder / f"{name}-{job}.log").read_text()


def ranks(run: Path) -> list[int]:
    """Pids of the processes that train it."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().split(b"\0")
            if b"launch.cli" in words and b"train" in words and str(run).encode() in words:
                found.append(int(place.parent.name))
    return found


def test_test_only(slurm: Path, capsys: pytest.CaptureFixture[str]):
    file = rendered(slurm, "asked", capsys)
    done = subprocess.run(["sbatch", "--test-only", file], capture_output=True, text=True)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    golden = ROOT / "tests" / "golden" / "launch" / "slurm-cpu.txt"
    assert subprocess.run(["sbatch", "--test-only", golden], capture_output=True).returncode == 0


def test_a_wrong_number_of_tasks_is_refused(slurm: Path, capsys: pytest.CaptureFixture[str]):
    file = rendered(slurm, "wrong", capsys)
    file.write_text(file.read_text().replace("--ntasks=4", "--ntasks=3"))
    job = submit(file)
    until(lambda: field(job, "JobState") == "FAILED", 90, "the job has failed")
    text = log(slurm, "wrong", job)
    assert re.search(r"llama4: error: rank \d \(n\d\): 3 processes started \(slurm\), but 4 were planned", text), text
    assert "not started again: it would fail again" in text
    assert int(field(job, "Restarts")) == 0


def test_stopped_killed_and_resumed(slurm: Path, capsys: pytest.CaptureFixture[str]):
    """SIGTERM, then the death of a rank: requeued after each, and the losses are to the bit those of a run in peace."""
    run = slurm / "broken"
    job = submit(rendered(slurm, "broken", capsys))
    until(lambda: steps(run) >= 3, 900, "three steps are made")
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: field(job, "Restarts") == "1", 600, "the job is requeued")
    stopped = steps(run)
    assert f"step {stopped}/{STEPS}" in log(slurm, "broken", job) and stopped < STEPS
    until(lambda: steps(run) > max(stopped, 6), 900, "it goes on")
    os.kill(ranks(run)[2], signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: not ranks(run), 60, "the others are gone")
    with capsys.disabled():
        print(f"a rank was killed: the others were gone after {time.monotonic() - killed:.1f} s")
    until(lambda: field(job, "JobState") in ("COMPLETED", "FAILED"), 900, "the job is done")
    assert field(job, "JobState") == "COMPLETED", log(slurm, "broken", job)
    assert field(job, "Restarts") == "2"

    peace = ["bash", str(rendered(slurm, "peace", capsys, "local"))]
    done = subprocess.run(peace, cwd=slurm, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(slurm / "peace")
