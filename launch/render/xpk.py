"""xpk: one command line, with which xpk makes a JobSet of its own on a cluster that it made."""

from __future__ import annotations

from launch.render import shell
from launch.render.job import Artefact, JobSpec
from launch.render.jobset import KILLED
from training import exits

TYPES = {"v5e": "v5litepod"}


def render(spec: JobSpec) -> Artefact:
    """TPUs alone: xpk puts a command for GPUs into its YAML between double quotes, which one with quotes breaks."""
    if spec.platform != "tpu":
        raise ValueError(f"xpk runs on TPUs, not on {spec.topology or 'CPUs'}: jobset runs on GPUs and CPUs, too")
    if not spec.cluster or not spec.image:
        raise ValueError("xpk needs --cluster and --image: xpk cluster create makes the one, docker/ the other")
    if spec.secrets:
        raise ValueError("xpk sets no variable from a secret: use jobset, or workload identity for the bucket")
    if any("\n" in word for word in (*spec.argv, *dict(spec.env).values())):
        raise ValueError("xpk takes the command as one line: a word or variable of this job has several; use jobset")
    device = f"{TYPES.get(spec.kind, spec.kind)}-{spec.slice_name.rpartition('-')[2]}"
    command = "; ".join([*shell.exports(spec), f"exec {shell.line(spec.program, *spec.argv)}"])
    words = ["xpk", "workload", "create", "--cluster", spec.cluster, "--workload", spec.name,
             "--docker-image", spec.image, "--tpu-type", device, "--num-slices", str(spec.slices),
             "--max-restarts", str(spec.restarts), "--restart-on-exit-codes",
             ",".join(str(code) for code in exits.AGAIN if code not in exits.KILLED),
             "--termination-grace-period-seconds", str(spec.grace + KILLED)]  # fmt: skip
    where = ["--zone", spec.zone] if spec.zone else []
    where += ["--project", spec.project] if spec.project else []
    words += [*where, *(["--spot"] if spec.spot else []), "--command", command]
    text = f"#!/usr/bin/env bash\n{shell.header(spec, 'xpk')}\n{_folded(words)}\n"
    of = shell.line("--cluster", spec.cluster, *where)
    return Artefact(
        f"{spec.name}.sh", text, ("bash", "{file}"), f"xpk workload list {of}; kubectl logs -f -l "
        f"jobset.sigs.k8s.io/jobset-name={spec.name} --prefix --max-log-requests {spec.hosts}",
        f"xpk workload delete --workload {spec.name} {of}",
        f"xpk workload delete --workload {spec.name} {of}, and the same command", "pip install xpk",
    )  # fmt: skip


def _folded(words: list[str]) -> str:
    """An option and its value a line."""
    parts, rest = [shell.line(*words[:3])], words[3:]
    while rest:
        take = 2 if len(rest) > 1 and not rest[1].startswith("--") else 1
        parts.append(shell.line(*rest[:take]))
        rest = rest[take:]
    return " \\\n  ".join(parts)
