"""Real launchers on this machine, four processes each: what they train is what one process trains.

Slow, and each skipped where its launcher is not installed: Open MPI (Debian's openmpi-bin), Ray (extra ray).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import QUICK, losses, options, program
from support import ROOT

from launch.render import ray
from launch.render.job import JobSpec

pytestmark = pytest.mark.slow
MORE_CPUS = (
    "import ray, runpy, sys; init = ray.init; ray.init = lambda **given: init(num_cpus=8, **given); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""Than this machine may have, for Ray to start four workers."""
ROOT_MPI = dict(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_rmaps_base_oversubscribe="1")


def environment() -> dict[str, str]:
    """Without what makes devices of a test's own; with compilations that are quick and kept."""
    keep = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "OMPI", "LLAMA4", "XLA_FLAGS"))}
    return keep | ROOT_MPI | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))


def words(folder: Path, target: str, name: str) -> list[str]:
    return ["launch", target, "pretrain:tiny", *options(folder), "--processes", "4", "--out", str(folder / name),
            "--program", str(program(folder)), "--workdir", str(folder), "--keep", str(folder), "--restarts", "0",
            "--env", f"XLA_FLAGS={QUICK}", "--grace", "60"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The losses of one process."""
    env = environment() | dict(XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count=1")
    run = [program(folder), "train", "pretrain:tiny", *options(folder), "--out", str(folder / "alone")]
    subprocess.run(run, env=env, check=True, capture_output=True)
    return losses(folder / "alone")


@pytest.mark.parametrize("target", ["local", "mpi", "ray"])
def test_four_processes_train_what_one_trains(target: str, folder: Path, alone: list[float]):
    if target == "mpi" and not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    if target == "ray" and not importlib.util.find_spec("ray"):
        pytest.skip("Ray is not installed: pip install 'ray[train]'")
    line = [program(folder), *words(folder, target, target)]
    if target == "ray":  # ray job submit needs a cluster's dashboard: the driver is run here, and starts Ray itself
        made = json.loads(subprocess.run([*line, "--json"], env=environment(), check=True, capture_output=True).stdout)
        (folder / "driver.py").write_text(made["text"])
        line = [sys.executable, "-c", MORE_CPUS, str(folder / "driver.py")]
    done = subprocess.run(line, env=environment(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert losses(folder / target) == pytest.approx(alone, rel=1e-6)
    start = json.loads((folder / target / "starts.jsonl").read_text())
    assert start["how"] == {"local": "explicit"}.get(target, target) and len(start["hosts"]) == 4


LONE = """
import pathlib
def main(argv):
    import jax
    from jax.experimental import multihost_utils
    with open(argv[-1] + f"/{jax.process_index()}", "a") as started:
        started.write("started\\n")
    if jax.process_index() == 1:
        return STATUS
    multihost_utils.sync_global_devices("never comes")
    return 0
"""


@pytest.mark.parametrize("status, times", [(2, 1), (70, 2)])
def test_a_lone_worker_of_ray_that_fails_ends_the_job(status: int, times: int, folder: Path):
    """The others wait for it in a collective; its status is the job's, and one that would come again is not tried."""
    if not importlib.util.find_spec("ray"):
        pytest.skip("Ray is not installed: pip install 'ray[train]'")
    place = folder / f"lone-{status}"
    (place / "launch").mkdir(parents=True)
    (place / "launch" / "__init__.py").write_text("")
    (place / "launch" / "cli.py").write_text(LONE.replace("STATUS", str(status)))
    spec = JobSpec("lone", ("train", str(place)), str(place), processes=2, restarts=1)
    (place / "driver.py").write_text(ray.render(spec).text)
    line = [sys.executable, "-c", MORE_CPUS, str(place / "driver.py")]
    env = environment() | dict(PYTHONPATH=str(place))
    done = subprocess.run(line, env=env, cwd=place, capture_output=True, text=True, timeout=1800)
    assert done.returncode == status, (done.stdout[-3000:], done.stderr[-3000:])
    assert [(place / rank).read_text() for rank in "01"] == ["started\n" * times] * 2


@pytest.mark.parametrize("target", ["local", "mpi"])
def test_sigterm_stops_with_a_checkpoint(target: str, folder: Path):
    if target == "mpi" and not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    run = folder / f"stopped-{target}"
    line = [program(folder), *words(folder, target, run.name), "--train.steps", "100000"]
    job = subprocess.Popen(line, env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)  # fmt: skip
    records = run / "metrics.jsonl"
    while not (records.exists() and len(records.read_text().splitlines()) > 2):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.5)
    told = [pid for pid in children(job.pid) if Path(f"/proc/{pid}/comm").read_text().strip() == "bash"]
    os.kill(told[0], signal.SIGTERM)
    job.communicate(timeout=600)
    last = len(records.read_text().splitlines())
    assert [step.name for step in (run / "checkpoints").iterdir() if step.name.isdecimal()] == [str(last)]


def children(pid: int) -> list[int]:
    """Of a process, all generations."""
    own = [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    return [*own, *(deeper for child in own for deeper in children(child))]
