"""One machine: the processes of a job beside each other, restarted together."""

from __future__ import annotations

import shlex

from launch.render import shell
from launch.render.job import Artefact, JobSpec

LAST_WORDS = 5
"""Seconds for the processes beside one that failed."""


def render(spec: JobSpec) -> Artefact:
    """A bash script that starts the processes, passes SIGTERM on to them, ends them all when one fails, and
    starts them again, at most `restarts` times, where the run asks for it."""
    if spec.hosts != 1 or spec.slices != 1:
        raise ValueError(f"local runs on this machine alone, not on {spec.hosts} hosts: --processes gives it several")
    total = spec.processes
    place = ["export JAX_PROCESS_ID=$1"]
    lines = [
        "#!/usr/bin/env bash",
        shell.header(spec, "local"),
        "set -uo pipefail",
        *([f"cd {shlex.quote(spec.workdir)} || exit 2"] if spec.workdir else []),
        *shell.required(spec),
        f"export JAX_COORDINATOR_ADDRESS=localhost:{spec.port} JAX_NUM_PROCESSES={total}",
        *shell.rank(spec, *place),
        "",
        "pids=() stopped=0",
        'stop() { stopped=1; kill -TERM "${pids[@]}" 2>/dev/null; }',
        "trap stop TERM",
        "trap 'stopped=1' INT  # a terminal's reaches the processes, too: told twice they would end at once",
        f"for ((attempt = 0; attempt <= {spec.restarts} && !stopped; attempt++)); do",
        "  pids=() status=0 began=$(date +%s)",
        f'  for ((i = 0; i < {total}; i++)); do (trap - TERM INT; rank "$i") & pids+=("$!"); done',
        '  [ "$stopped" = 0 ] || stop  # those, too, that were started since',
        '  while [ -n "$(jobs -pr)" ]; do',
        '    if wait -n || [ "$stopped" = 1 ] || [ "$status" != 0 ]; then continue; fi',
        "    status=1",
        f"    sleep {LAST_WORDS}  # the others say what they saw; they cannot go on without the one that failed",
        '    kill -KILL "${pids[@]}" 2>/dev/null',
        "  done",
        '  [ "$stopped" = 0 ] || { wait "${pids[0]}"; exit; }',
        '  for pid in "${pids[@]}"; do wait "$pid" || status=1; done  # some may have ended before they were watched',
        '  [ "$status" != 0 ] || exit 0',
        f'  {shell.restart(spec)} || exit "$status"',
        "done",
        'exit "$status"',
    ]  # fmt: skip
    here = shell.line(spec.program, "status", spec.folder)
    return Artefact(
        f"{spec.name}.sh", "\n".join(lines) + "\n", ("bash", "{file}"), here,
        "Ctrl-C, or SIGTERM to the script: every process stops after its step, with a checkpoint",
        "the same command", "bash",
    )  # fmt: skip
