"""What shell scripts of several targets share: quoting, and the function that every process of a job runs."""

from __future__ import annotations

import shlex

from launch.render.job import JobSpec

GPU_FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"
"""Put before a host's own XLA_FLAGS, which thereby win."""
PROFILES = ("/usr/local/gib/scripts/set_nccl_env.sh", "/usr/local/nvidia/lib64/nccl-env-profile.sh")
"""Where hosts of clouds keep NCCL's settings for their network; a file that NCCL_ENV_PROFILE names goes before."""


def line(*words: str) -> str:
    """A command of a shell, quoted."""
    return shlex.join(words)


def header(spec: JobSpec, target: str) -> str:
    """What the file is and how to make it again."""
    return f"# {spec.name}, rendered by llama4 launch {target}; {describe(spec)}."


def describe(spec: JobSpec) -> str:
    """The size of the job in words."""
    hosts = f"{spec.hosts} host{'s' * (spec.hosts > 1)}"
    each = f" of {spec.processes} processes" * (spec.processes > 1)
    slices = f", {spec.slices} slices" * (spec.slices > 1)
    cpus = f"{spec.devices} CPU device{'s' * (spec.devices > 1)} a process"
    return f"{hosts}{each}{slices}, {spec.topology or cpus}"


def exports(spec: JobSpec) -> list[str]:
    """Lines that set the environment of a process; secrets are referred to, never written down."""
    given = dict(spec.env)
    given.pop("XLA_FLAGS", "")
    lines = ["export " + " ".join(f"{name}={value}" for name, value in spec.planned.items())]
    if spec.platform == "cpu":
        lines.append("export JAX_PLATFORMS=cpu")
    if spec.platform == "gpu":
        places = " ".join(PROFILES)
        lines += [
            "# NCCL as this host's network wants it; XLA_FLAGS are added to, not replaced",
            f'for profile in "${{NCCL_ENV_PROFILE:-}}" {places}; '
            'do if [ -r "$profile" ]; then . "$profile"; break; fi; done',
            'export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"',
        ]
    if added := flags(spec):
        lines.append(f'export XLA_FLAGS={shlex.quote(added)}"${{XLA_FLAGS:+ $XLA_FLAGS}}"')
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in given.items()]


def flags(spec: JobSpec) -> str:
    """XLA_FLAGS of the job, which stand before those that a host has, so that a host's win."""
    ours = {"gpu": GPU_FLAGS, "cpu": f"--xla_force_host_platform_device_count={spec.devices}", "tpu": ""}[spec.platform]
    return " ".join(filter(None, [ours, dict(spec.env).get("XLA_FLAGS", "")]))


def restart(spec: JobSpec, *more: str) -> str:
    """The question whether the job, which was started at $began and has ended, should be started again."""
    return f'{line(spec.program, "status", spec.folder, "--restart", *more)} --since "$began"'


def required(spec: JobSpec) -> list[str]:
    """Lines that end the script where a secret is not in the environment that it is started from."""
    return [f': "${{{name}:?is a secret that this job needs: export it first}}"' for name, _ in spec.secrets]


def rank(spec: JobSpec, *first: str) -> list[str]:
    """The function `rank`: what every process runs, after the lines `first`.

    A launcher on another host gets it by its text: `bash -c "$(declare -f rank); rank"`.
    """
    command = line(spec.program, *spec.argv)
    return ["rank() {", *(f"  {text}" for text in (*first, *exports(spec), f"exec {command}")), "}"]


CALL = '"$(declare -f rank); rank"'
