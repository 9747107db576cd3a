"""xpk: one command line, with which xpk makes a JobSet of its own on a cluster that it made."""

from __future__ import annotations

from launch.render import shell
from launch.render.job import Artefact, JobSpec
from launch.render.jobset import AGAIN, KILLED

TYPES = {"v5e": "v5litepod", "h100": "h100-mega-80gb"}


def render(spec: JobSpec) -> Artefact:
    """xpk counts slices of TPUs, and nodes of GPUs; it knows the devices of both by names of its own."""
    if spec.platform == "cpu":
        raise ValueError("xpk runs on TPUs and GPUs: give --topology, e.g. v5p:4x4x8 or h100:8x8")
    if not spec.cluster or not spec.image:
        raise ValueError("xpk needs --cluster and --image: xpk cluster create makes the one, docker/ the other")
    if spec.secrets:
        raise ValueError("xpk sets no variable from a secret: use jobset, or workload identity for the bucket")
    number = spec.chips_per_host if spec.platform == "gpu" else spec.slice_name.rpartition("-")[2]
    device = f"{TYPES.get(spec.kind, spec.kind)}-{number}"
    size = ["--num-nodes", str(spec.hosts)] if spec.platform == "gpu" else ["--num-slices", str(spec.slices)]
    if any("\n" in word for word in (*spec.argv, *dict(spec.env).values())):
        raise ValueError("xpk takes the command as one line: a word or variable of this job has several; use jobset")
    exports = [line for line in shell.exports(spec) if not line.startswith("#")]
    command = "; ".join([*exports, f"exec {shell.line(spec.program, *spec.argv)}"])
    words = ["xpk", "workload", "create", "--cluster", spec.cluster, "--workload", spec.name,
             "--docker-image", spec.image, "--tpu-type" if spec.platform == "tpu" else "--device-type", device, *size,
             "--max-restarts", str(spec.restarts), "--restart-on-exit-codes",
             ",".join(str(code) for code in AGAIN if code < 127),
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
