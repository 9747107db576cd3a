"""TPU VMs by gcloud: a script that makes the slice, runs the job on all of its workers and starts it again."""

from __future__ import annotations

import shlex

from launch.render import shell
from launch.render.job import KINDS, Artefact, JobSpec

WAITS = 720
"""Minutes to wait for a slice."""


def render(spec: JobSpec) -> Artefact:
    """The script stays with the job: a slice that was taken back is made anew, a job that asks for it started again,
    `restarts` times in all. Secrets come from Secret Manager, on the workers."""
    if spec.platform != "tpu" or not KINDS[spec.kind].vm:
        some = ", ".join(kind for kind, of in KINDS.items() if of.vm)
        raise ValueError(
            f"tpu-vm runs on slices of {some}, not on {spec.topology or 'CPUs'}: give --topology v5p:4x4x8"
        )
    if spec.slices > 1:
        raise ValueError("tpu-vm makes one slice; for several use jobset, xpk or ray")
    if not spec.zone:
        raise ValueError("tpu-vm needs --zone, e.g. --zone us-east5-a")
    where = ["--zone", spec.zone, *(["--project", spec.project] if spec.project else [])]
    vm = ("gcloud", "compute", "tpus", "tpu-vm")
    create = shell.line(*vm, "create", spec.name, *where, "--accelerator-type", spec.slice_name, "--version",
                        KINDS[spec.kind].runtime, *(["--spot"] if spec.spot else []))  # fmt: skip
    state = shell.line(*vm, "describe", spec.name, *where, "--format=value(state)")
    delete = shell.line(*vm, "delete", spec.name, *where, "--quiet")
    ssh = shell.line(*vm, "ssh", spec.name, *where, "--worker=all")
    # The brackets keep pkill from the shell that runs it.
    term = shell.line(*vm, "ssh", spec.name, *where, "--worker=all", "--command=pkill -TERM -f '[l]lama4 train'")
    secrets = [
        f'{name}="$(gcloud secrets versions access latest --secret={place or name.lower()})" || exit 2; export {name}'
        for name, place in spec.secrets
    ]
    first = [*([f"cd {shlex.quote(spec.workdir)} || exit 2"] if spec.workdir else []), *secrets]
    lines = [
        "#!/usr/bin/env bash",
        shell.header(spec, "tpu-vm"),
        "set -uo pipefail",
        *shell.rank(spec, *first),
        "",
        "job='' stopped=0",
        f"stop() {{ stopped=1; [ -z \"$job\" ] || (trap '' TERM INT HUP; {term}); }}  # workers hear no terminal",
        "trap stop TERM INT HUP",
        f"for ((attempt = 0; attempt <= {spec.restarts} && !stopped; attempt++)); do",
        f'  state=$({state} 2>/dev/null)',
        '  if [ "$state" != READY ]; then  # not there yet, or taken back',
        f'    [ -z "$state" ] || {delete}',
        f"    for ((i = 0; i < {WAITS} && !stopped; i++)); do",
        f'      if {create} || [ "$({state})" = READY ]; then break; fi  # it may be there, and not have been seen',
        "      sleep 60",
        "    done",
        "  fi",
        '  [ "$stopped" = 0 ] || break',
        "  began=$(date +%s)",
        f"  (trap '' TERM INT HUP; exec {ssh} --command={shell.CALL}) & job=$!",
        '  [ "$stopped" = 0 ] || stop',
        '  while wait "$job"; status=$?; kill -0 "$job" 2>/dev/null; do :; done  # a signal ends a wait early',
        '  [ "$status" != 0 ] || exit 0',
        '  [ "$stopped" = 0 ] || break',
        f'  [ "$({state} 2>/dev/null)" = READY ] || continue  # the slice is gone, not the job at fault',
        f"  {shell.restart(spec)} || break",
        "done",
        'exit "${status:-1}"',
    ]  # fmt: skip
    return Artefact(
        f"{spec.name}.sh", "\n".join(lines) + "\n", ("bash", "{file}"), shell.line(spec.program, "status", spec.folder),
        f"Ctrl-C, or SIGTERM to the script: all workers stop after a step, with a checkpoint; the slice costs until "
        f"{delete}; from elsewhere {term}", "the same command",
        "the Google Cloud CLI (gcloud)",
    )  # fmt: skip
