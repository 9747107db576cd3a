"""Which process of which job this is, from what the launcher put into its environment."""

from __future__ import annotations

import glob
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

from launch.render.job import PORT

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class Place(NamedTuple):
    """Of a process among those of its job."""

    how: str
    """Who said so."""
    coordinator: str
    """HOST:PORT, where the first process is met; empty for a process alone."""
    processes: int
    process: int
    local: int
    """Its number among those on its host."""
    host: str
    hosts: tuple[str, ...] = ()
    """Of all processes, once they have met."""

    @property
    def job(self) -> str | None:
        """Its scheduler's name for it."""
        return job()

    def __str__(self) -> str:
        return f"rank {self.process} ({self.host})"


def job(env: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler's name for the job that this process belongs to, the same for all of its starts."""
    return next((env[name] for name in ("SLURM_JOB_ID", "JOBSET_NAME", "SKYPILOT_TASK_ID") if env.get(name)), None)


ALONE = Place("alone", "", 1, 0, 0, "")


def recognise(env: Mapping[str, str] = os.environ, metadata: Callable[[str], str] | None = None) -> Place:
    """The first that applies of: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Open MPI; SLURM;
    MPICH's PMI; a TPU slice on GKE; one of TPU VMs. A process that nobody counted is alone.

    ValueError, in a line, for what is half there. `metadata` answers for Google's server, which is asked on a TPU VM
    alone.
    """
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    named = [name for name in EXPLICIT[1:] if name in env]
    if named:
        if missing := [name for name in EXPLICIT if not env.get(name)]:
            raise ValueError(f"{' and '.join(named)} is set, but not {' and '.join(missing)}: a process needs all of "
                             f"{', '.join(EXPLICIT)}, or none")  # fmt: skip
        return _place("explicit", env[EXPLICIT[0]], env[EXPLICIT[1]], env[EXPLICIT[2]], None, host, env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _place("mpi", _of_open_mpi(env), env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_RANK"],
                      env.get("OMPI_COMM_WORLD_LOCAL_RANK"), host, env)  # fmt: skip
    if "SLURM_JOB_ID" in env:
        return _of_slurm(env, host)
    if "PMI_SIZE" in env:
        if env["PMI_SIZE"] != "1" and not env.get(EXPLICIT[0]):
            raise ValueError(f"this mpirun does not say where the first process is: set {EXPLICIT[0]}=HOST:{PORT} for "
                             "all of them (-genv of MPICH and Intel MPI)")  # fmt: skip
        return _place("mpi", env.get(EXPLICIT[0], ""), env["PMI_SIZE"], env["PMI_RANK"], env.get("MPI_LOCALRANKID"),
                      host, env)  # fmt: skip
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers and "TPU_WORKER_ID" in env:
        return _of_tpus("gke", workers.split(","), env["TPU_WORKER_ID"], env, host, env)
    if metadata is None and glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        metadata = google_metadata
    if metadata and (number := metadata("agent-worker-number")):
        ends = [end.split(":") for end in metadata("worker-network-endpoints").split(",")]
        pairs = (row.partition(":")[::2] for row in metadata("tpu-env").splitlines())
        slices = {name.strip(): value.strip().strip("'") for name, value in pairs}
        return _of_tpus("tpu-vm", [end[2] if len(end) == 3 else end[0] for end in ends], number, slices, host, env)
    return ALONE._replace(host=host)


def google_metadata(key: str) -> str:
    """An attribute of this machine in Google's cloud; empty elsewhere."""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _place(how: str, coordinator: str, processes: str, process: str, local: str | None, host: str,
           env: Mapping[str, str]) -> Place:  # fmt: skip
    try:
        count, number = int(processes), int(process)
        beside = max(1, int(env.get("LLAMA4_PROCESSES", 0)) // max(1, int(env.get("LLAMA4_HOSTS", 1))))
        own = int(local) if local else number % beside
    except ValueError:
        raise ValueError(f"{how}: process {process!r} of {processes!r} are no whole numbers") from None
    if not 0 <= number < count:
        raise ValueError(f"{how}: process {number} is none of the {count} from 0 to {count - 1}")
    if count > 1 and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"{how}: the first process's address must be HOST:PORT, not {coordinator!r}")
    return Place(how, coordinator if count > 1 else "", count, number, own, host)


def _of_slurm(env: Mapping[str, str], host: str) -> Place:
    """A task of srun. The first node of its step is where to meet, on a port of the job's own."""
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1"
    if "SLURM_STEP_NODELIST" not in env:
        if tasks != "1":
            raise ValueError(f"this is SLURM's batch script, or the shell of an allocation, not one of its {tasks} "
                             "tasks: start llama4 with srun")  # fmt: skip
        return ALONE._replace(host=host)
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
    first = "".join(found.groups(default="")) if found else ""
    port = 61440 + int(env["SLURM_JOB_ID"]) % 4096  # as JAX does it
    return _place("slurm", f"{first}:{port}", tasks, env["SLURM_PROCID"], env.get("SLURM_LOCALID"), host, env)


def _of_open_mpi(env: Mapping[str, str]) -> str:
    """Where mpirun itself runs, with Open MPI 4; what it was told to pass on, with any."""
    if given := env.get(EXPLICIT[0]):
        return given
    found = re.search(r"^(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found:
        raise ValueError(f"this mpirun does not say where the first process is: mpirun -x {EXPLICIT[0]}=HOST:{PORT}")
    return f"{found[2] or found[3]}:{61440 + int(found[1]) // 4096 % 4096}"


def _of_tpus(how: str, workers: list[str], number: str, slices: Mapping[str, str], host: str,
             env: Mapping[str, str]) -> Place:  # fmt: skip
    """Workers of one slice, or of several, whose first one's first worker is where all meet."""
    count, index = int(slices.get("MEGASCALE_NUM_SLICES") or 1), int(slices.get("MEGASCALE_SLICE_ID") or 0)
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") if count > 1 else "") or workers[0]
    process = int(number) + index * len(workers)
    return _place(how, f"{first.split(':')[0]}:{PORT}", f"{count * len(workers)}", f"{process}", "0", host, env)
