"""Mistakes of a launch, each of which ends with a line of its own, soon."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT

from launch.place import recognise
from launch.preflight import compare

MAIN = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
AHEAD = "import time; then = time.time; time.time = lambda: then() + 3600; " + MAIN


class Job:
    """Two processes of a job, and what may be wrong with the second one."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.env = [self._env(0), self._env(1)]
        self.words = [["train", "pretrain:tiny", "--out", str(folder / "run")] for _ in range(2)]
        self.cwd, self.code = [folder, folder], [MAIN, MAIN]
        self.taken: socket.socket | None = None

    def _env(self, process: int) -> dict[str, str]:
        keep = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "OMPI", "JAX_", "LLAMA4", "TPU"))}
        return keep | dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{self.port}",
                           JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(process), LLAMA4_START_TIMEOUT="8",
                           XLA_FLAGS="--xla_force_host_platform_device_count=1")  # fmt: skip

    @property
    def all(self) -> tuple[list, ...]:
        return self.code, self.words, self.cwd, self.env

    def run(self) -> tuple[list[int], set[str], float]:
        """(exit statuses, the lines of errors without who wrote them, seconds)."""
        began = time.monotonic()
        started = [subprocess.Popen([sys.executable, "-c", code, *words], cwd=cwd, env=env, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.PIPE, text=True)
                   for code, words, cwd, env in zip(*self.all, strict=True)]  # fmt: skip
        errors = [p.communicate(timeout=120)[1] for p in started]
        told = {
            re.sub(r"^\[.*?\] ", "", line) for text in errors for line in text.splitlines() if "llama4: error" in line
        }
        if self.taken:
            self.taken.close()
        assert not any("Traceback" in text for text in errors), errors
        return [p.returncode for p in started], told, time.monotonic() - began


def both(job: Job, **variables: str) -> None:
    for env in job.env:
        env.update(variables)


def no_name(job: Job) -> None:
    both(job, JAX_COORDINATOR_ADDRESS=f"no-such-host.invalid:{job.port}")


def loopback(job: Job) -> None:
    both(job, LLAMA4_HOSTS="2", LLAMA4_PROCESSES="2", JAX_COORDINATOR_ADDRESS=f"localhost:{job.port}")


def too_few(job: Job) -> None:
    both(job, LLAMA4_PROCESSES="4")


def other_count(job: Job) -> None:
    job.env[1] |= dict(JAX_NUM_PROCESSES="3")


def twice(job: Job) -> None:
    both(job, JAX_NUM_PROCESSES="3")
    job.env.append(job.env[1])
    job.words.append(job.words[1])
    job.cwd.append(job.folder)
    job.code.append(MAIN)


def one_missing(job: Job) -> None:
    for of in (job.env, job.words, job.cwd, job.code):
        del of[1]


def first_missing(job: Job) -> None:
    for of in (job.env, job.words, job.cwd, job.code):
        del of[0]


def half_set(job: Job) -> None:
    for env in job.env:
        del env["JAX_PROCESS_ID"]


def no_srun(job: Job) -> None:
    for env in job.env:
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            del env[name]
        env |= dict(SLURM_JOB_ID="7", SLURM_NTASKS="2")


def other_config(job: Job) -> None:
    job.words[1] += ["--train.batch", "16"]


def other_code(job: Job) -> None:
    for package in ("llama4_jax", "training", "data", "configs", "launch"):
        shutil.copytree(ROOT / package, job.folder / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (job.folder / "copy" / "data" / "cache.py").open("a") as changed:
        changed.write("# changed\n")
    job.env[1] |= dict(PYTHONPATH=str(job.folder / "copy"))


def unwritable(job: Job) -> None:
    for number, words in enumerate(job.words):
        words[-1] = "run"
        job.cwd[number] = job.folder / f"host{number}"
        job.cwd[number].mkdir()
    (job.cwd[1] / "run").write_text("a file\n")


def unshared(job: Job) -> None:
    unwritable(job)
    (job.cwd[1] / "run").unlink()


def clock(job: Job) -> None:
    job.code[1] = AHEAD


def port_taken(job: Job) -> None:
    job.taken = socket.create_server(("", job.port))


MISTAKES: dict[Callable[[Job], None], str] = {
    no_name: r"rank \d \(\S+\): the coordinator's name 'no-such-host.invalid' cannot be resolved: ",
    loopback: r"the coordinator localhost:\d+ is every host's own loopback, which the others of 2 hosts cannot reach",
    too_few: r"rank \d \(\S+\): 2 processes started \(explicit\), but 4 were planned",
    other_count: r"rank 1 \(\S+\) counts 3 processes, rank 0 \(\S+\) counts 2",
    twice: r"rank 1 \(\S+\) came twice",
    one_missing: r"rank 1 of 2 did not come within 8 s",
    first_missing: r"rank 1 \(\S+\) could not reach the first process at 127.0.0.1:\d+ within 8 s",
    half_set: r"JAX_NUM_PROCESSES is set, but not JAX_PROCESS_ID",
    no_srun: r"this is SLURM's batch script, or the shell of an allocation, not one of its 2 tasks: start llama4 with",
    other_config: r"rank 1 \(\S+\) has another configuration: train.batch is 16, but 8 of rank 0",
    other_code: r"rank 1 \(\S+\) runs other code \(\w+\) than rank 0 \(\S+\) \(\w+\)",
    unwritable: r"rank 1 \(\S+\) cannot write into the run's folder run: ",
    unshared: r"rank 1 \(\S+\) wrote into the run's folder run, but rank 0 \(\S+\) does not see it: the folder",
    clock: r"rank 1 \(\S+\): its clock is 3600 s ahead of that of rank 0",
    port_taken: r"rank 0 \(\S+\) cannot listen on port \d+: Address already in use",
}  # fmt: skip
QUICKLY_TESTED = (too_few, other_config, unshared)
"""The others take longer together than quick tests may."""


@pytest.mark.parametrize(
    "mistake", [m if m in QUICKLY_TESTED else pytest.param(m, marks=pytest.mark.slow) for m in MISTAKES],
    ids=lambda mistake: mistake.__name__,
)  # fmt: skip
def test_a_mistake_is_named(mistake: Callable[[Job], None], tmp_path: Path):
    job = Job(tmp_path)
    mistake(job)
    statuses, told, seconds = job.run()
    assert all(statuses), statuses
    named = [line for line in told if re.search(MISTAKES[mistake], line)]
    assert len(named) >= 1, told
    assert sum(bool(re.search(pattern, named[0])) for pattern in MISTAKES.values()) == 1
    print(f"{mistake.__name__}: {seconds:.1f} s: {named[0]}")


def reports(**second: object) -> dict[int, dict]:
    of = dict(host="n1", unwritable="", folder="run", versions={"jax": "1"}, code="a", config={"x": 1}, skew=0.0)
    return {0: of, 1: of | {"host": "n2"} | second}


def test_equal_reports_agree():
    assert compare(reports()) == ""
    assert "rank 1 (n2) has jax 2, rank 0 (n1) has 1" in compare(reports(versions={"jax": "2"}))
    assert "x is 'missing', but 1 of rank 0" in compare(reports(config={}))
    assert "31 s behind that of rank 0" in compare(reports(skew=-31.0))


SLURM = dict(SLURM_JOB_ID="4100", SLURM_STEP_NODELIST="gpu[007-009,12],x", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="5",
             SLURM_LOCALID="1", SLURMD_NODENAME="gpu008")  # fmt: skip
OMPI = dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1")
GKE = dict(TPU_WORKER_HOSTNAMES="w0,w1,w2,w3", TPU_WORKER_ID="2")


@pytest.mark.parametrize("env, how, coordinator, processes, process, local", [
    ({}, "alone", "", 1, 0, 0),
    (dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3", LLAMA4_PROCESSES="4",
          LLAMA4_HOSTS="2"),
     "explicit", "a:1", 4, 3, 1),
    (SLURM, "slurm", "gpu007:61444", 8, 5, 1),
    (SLURM | dict(SLURM_STEP_NODELIST="n1"), "slurm", "n1:61444", 8, 5, 1),
    (dict(SLURM_JOB_ID="1", SLURM_NTASKS="1"), "alone", "", 1, 0, 0),
    (OMPI | dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"), "mpi",
     "10.96.0.1:62624", 4, 3, 1),
    (OMPI | SLURM | dict(JAX_COORDINATOR_ADDRESS="h:9"), "mpi", "h:9", 4, 3, 1),
    (dict(PMI_SIZE="2", PMI_RANK="1", JAX_COORDINATOR_ADDRESS="h:9"), "mpi", "h:9", 2, 1, 0),
    (GKE, "gke", "w0:8482", 4, 2, 0),
    (GKE | dict(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1", MEGASCALE_COORDINATOR_ADDRESS="m:8080"), "gke",
     "m:8482", 8, 6, 0),
])  # fmt: skip
def test_places(env: dict[str, str], how: str, coordinator: str, processes: int, process: int, local: int):
    assert recognise(env, metadata=lambda key: "")[:5] == (how, coordinator, processes, process, local)


def test_a_tpu_vm_asks_google():
    answers = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3", "tpu-env": "X: '1'"}
    assert recognise({}, metadata=answers.__getitem__)[:4] == ("tpu-vm", "10.0.0.2:8482", 2, 1)


@pytest.mark.parametrize("env, says", [
    (dict(JAX_PROCESS_ID="0"), "JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
    (dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="2"),
     "process 2 is none of the 2 from 0 to 1"),
    (dict(JAX_COORDINATOR_ADDRESS="a", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"), "must be HOST:PORT, not 'a'"),
    (dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="x", JAX_PROCESS_ID="1"), "are no whole numbers"),
    (dict(PMI_SIZE="2", PMI_RANK="1"), "this mpirun does not say where the first process is"),
    (OMPI, "mpirun -x JAX_COORDINATOR"),
])  # fmt: skip
def test_half_an_environment_is_refused(env: dict[str, str], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        recognise(env, metadata=lambda key: "")
