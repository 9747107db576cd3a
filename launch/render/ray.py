"""Ray: a driver that runs the command on every worker of a JaxTrainer."""

from __future__ import annotations

import pprint
from typing import Any

from launch.render import shell
from launch.render.job import Artefact, JobSpec
from training import exits

RAY_KINDS = {"v5e": "TPU-V5LITEPOD", "v5p": "TPU-V5P", "v6e": "TPU-V6E", "tpu7x": "TPU-V7X"}
DRIVER = '''"""{about}"""

import os
import subprocess
import sys

JOB = {job}
PROFILES = {profiles}
FINAL, LOST = {final}, {lost}  # exit statuses that would come again; that of a worker which was lost


def environment() -> None:
    """XLA_FLAGS are added to what the worker has, before it, and NCCL gets what this host's network wants."""
    os.environ.update(JOB["env"])
    if JOB["flags"]:
        os.environ["XLA_FLAGS"] = " ".join([JOB["flags"], os.environ.get("XLA_FLAGS", "")]).strip()
    for profile in [os.environ.get("NCCL_ENV_PROFILE", ""), *PROFILES] if JOB["gpu"] else []:
        if os.path.isfile(profile):
            show = ["bash", "-c", '. "$1" >&2 && env -0', "profile", profile]
            lines = subprocess.run(show, check=True, capture_output=True, text=True).stdout.split("\\0")
            os.environ.update(dict(line.split("=", 1) for line in lines if line.startswith("NCCL_")))
            break


class Ended(RuntimeError):
    """The command ended with this exit status."""


def worker() -> None:
    """The command. One worker that raises ends the others, wherever they wait for it."""
    from launch.cli import main

    if status := main(JOB["argv"]):
        raise Ended(status)


def main() -> int:
    """Exit status of the job: workers are started again, `restarts` times, unless one ended as it would again."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import WorkerGroupError
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    missing = [name for name in JOB["secrets"] if name not in os.environ]
    if missing:
        sys.exit(f"export {{', '.join(missing)}} first: the job needs what is secret in it")
    secrets = {{name: os.environ[name] for name in JOB["secrets"]}}
    ray.init(runtime_env={{"env_vars": secrets, "worker_process_setup_hook": environment}})
    for attempt in range(JOB["restarts"] + 1):
        try:
            JaxTrainer(
                worker,
                jax_config=JaxConfig(**JOB["jax"]),
                scaling_config=ScalingConfig(**JOB["scaling"]),
                run_config=RunConfig(name=f"{{JOB['name']}}-{{attempt}}", failure_config=FailureConfig(max_failures=0)),
            ).fit()
            return 0
        except WorkerGroupError as error:
            print(error, file=sys.stderr, flush=True)
            ends = [of.args[0] for of in error.worker_failures.values() if type(of).__name__ == "Ended"]
            status = next((end for end in ends if end in FINAL), ends[0] if ends else LOST)
            if status in FINAL:
                break
    return status


if __name__ == "__main__":
    sys.exit(main())
'''


def render(spec: JobSpec) -> Artefact:
    """A Python program. All that varies stands in one literal; Ray starts jax.distributed in its workers itself."""
    job = {
        "name": spec.name,
        "argv": list(spec.argv),
        "env": spec.planned | {"JAX_PLATFORMS": spec.platform if spec.platform != "gpu" else "cuda"}
               | {name: value for name, value in spec.env if name != "XLA_FLAGS"},
        "flags": shell.flags(spec),
        "gpu": spec.platform == "gpu",
        "secrets": [name for name, _ in spec.secrets],
        "restarts": spec.restarts,
        "jax": {"use_tpu" if spec.platform == "tpu" else "use_gpu": True},  # use_gpu starts it on CPUs, too
        "scaling": _scaling(spec),
    }  # fmt: skip
    literal = pprint.pformat(job, width=100, sort_dicts=False)
    text = DRIVER.format(about=shell.header(spec, "ray").removeprefix("# "), job=literal, profiles=shell.PROFILES,
                         final=exits.FINAL, lost=exits.LOST)  # fmt: skip
    workdir = spec.workdir or "."
    submit = ["ray", "job", "submit", "--no-wait", "--submission-id", spec.name, "--working-dir", workdir]
    submit += ["--address", spec.cluster] if spec.cluster else []
    address = f" --address {spec.cluster}" if spec.cluster else ""
    return Artefact(
        f"{spec.name}.py", text, (*submit, "--", "python", "{file}"), f"ray job logs --follow {spec.name}{address}",
        f"ray job stop {spec.name}{address}", f"ray job delete {spec.name}{address}, and the same command",
        "pip install 'ray[train,default]'",
    )  # fmt: skip


def _scaling(spec: JobSpec) -> dict[str, Any]:
    workers: dict[str, Any] = {"num_workers": spec.hosts * spec.processes}
    if spec.platform == "gpu":
        return workers | {"use_gpu": True, "resources_per_worker": {"GPU": spec.devices}}
    if spec.platform == "tpu":
        return workers | {"use_tpu": True, "topology": spec.shape, "accelerator_type": RAY_KINDS[spec.kind],
                          "resources_per_worker": {"TPU": spec.chips_per_host}}  # fmt: skip
    return workers | {"resources_per_worker": {"CPU": 1}}
