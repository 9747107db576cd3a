"""A file for each place where people run jobs, rendered from one `JobSpec`."""

from __future__ import annotations

import importlib

from launch.render.job import Artefact, JobSpec

TARGETS = {
    "local": "this machine, any number of processes",
    "slurm": "sbatch",
    "jobset": "Kubernetes JobSets, with Kueue where it is there",
    "sky": "SkyPilot's managed jobs",
    "ray": "Ray's JaxTrainer",
    "tpu-vm": "TPU VMs by gcloud",
    "mpi": "mpirun of Open MPI",
    "xpk": "xpk on GKE",
}


def render(target: str, spec: JobSpec) -> Artefact:
    """The target's file and commands; ValueError for what it cannot run."""
    return importlib.import_module(f"launch.render.{target.replace('-', '_')}").render(spec)
