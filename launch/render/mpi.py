"""Open MPI: one mpirun line, from one of the hosts or beside them."""

from __future__ import annotations

import shlex

from launch.render import shell
from launch.render.job import Artefact, JobSpec
from training import exits


def render(spec: JobSpec) -> Artefact:
    """The first host is where the processes meet.

    `grace` lies between mpirun's SIGTERM and its SIGKILL. But Open MPI 4 lets as much pass before it hands SIGTERM on,
    and both whenever one process ends in another way than well, though none be left. So the script tells it to stop by
    SIGUSR2, which goes on at once (in a session of its own mpirun does not hear a terminal's Ctrl-C beside that), and
    it is to wait until all have ended, which they do without one that failed; the shell around each makes an exit
    status of a signal. What mpirun then ends with says nothing, and what the run's folder says is asked."""
    if spec.platform == "tpu":
        raise ValueError(f"mpi runs on GPUs and CPUs, not on {spec.topology}: jobset, xpk, ray and tpu-vm run on TPUs")
    if spec.hosts > 1 and not spec.hostfile:
        raise ValueError(f"mpi on {spec.hosts} hosts needs --hostfile FILE, a host a line, the first one to meet at")
    total = spec.hosts * spec.processes
    where = ["--hostfile", spec.hostfile, "--map-by", f"ppr:{spec.processes}:node"] if spec.hostfile else []
    secrets = [word for name, _ in spec.secrets for word in ("-x", name)]
    mpirun = shell.line("setsid", "mpirun", "-np", str(total), *where, "--bind-to", "none", "--mca",
                        "odls_base_sigkill_timeout", str(spec.grace), "--mca", "orte_abort_on_non_zero_status", "0",
                        "-x", "JAX_COORDINATOR_ADDRESS", *secrets)  # fmt: skip
    first = f"$(awk '!/^[[:space:]]*(#|$)/ {{ print $1; exit }}' {shlex.quote(spec.hostfile)})" if spec.hostfile else ""
    lines = [
        "#!/usr/bin/env bash",
        shell.header(spec, "mpi"),
        "set -uo pipefail",
        *([f"cd {shlex.quote(spec.workdir)} || exit 2"] if spec.workdir else []),
        *shell.required(spec),
        f'JAX_COORDINATOR_ADDRESS="{first or "localhost"}:{spec.port}"',
        f"export JAX_COORDINATOR_ADDRESS PRTE_MCA_odls_base_sigkill_timeout={spec.grace}  # as Open MPI 5 names it",
        *shell.rank(spec, *([f"cd {shlex.quote(spec.workdir)} || exit 2"] if spec.workdir else [])),
        "",
        "job='' stopped=0",
        'stop() { stopped=1; kill -USR2 "$job" 2>/dev/null; }  # mpirun hands it on at once',
        "trap stop TERM INT HUP",
        f"for ((attempt = 0; attempt <= {spec.restarts} && !stopped; attempt++)); do",
        "  began=$(date +%s)",
        f'  (trap - TERM INT HUP; exec {mpirun} bash -c "$(declare -f rank); trap : TERM USR2; (rank); exit") & job=$!',
        '  [ "$stopped" = 0 ] || stop',
        '  while wait "$job"; kill -0 "$job" 2>/dev/null; do :; done  # a signal ends a wait early',
        f"  {shell.line(spec.program, 'status', spec.folder, '--complete')} && exit",
        f'  [ "$stopped" = 0 ] || exit {exits.STOPPED}',
        f"  {shell.restart(spec)} || break",
        "done",
        f"exit {exits.FAILED}",
    ]
    return Artefact(
        f"{spec.name}.sh", "\n".join(lines) + "\n", ("bash", "{file}"), shell.line(spec.program, "status", spec.folder),
        "Ctrl-C, or SIGTERM to the script: every process stops after its step, with a checkpoint",
        "the same command", "openmpi-bin, or a module of your cluster",
    )  # fmt: skip
