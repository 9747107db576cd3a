"""SLURM: an sbatch script whose steps get SIGTERM before the time limit, and which is put back in the queue."""

from __future__ import annotations

import math
import shlex

from launch.render import shell
from launch.render.job import Artefact, JobSpec


def render(spec: JobSpec) -> Artefact:
    """One task a process. The signal goes to the tasks, not to the script (no `B:`), `grace` seconds before the end;
    a task that dies takes the step with it. `srun` turns a task's 75 into 143 then, so that what the run left in its
    folder, not the exit status, says whether to requeue (`llama4 status --restart`)."""
    if spec.platform == "tpu":
        raise ValueError(
            f"slurm runs on GPUs and CPUs, not on {spec.topology}: jobset, xpk, ray and tpu-vm run on TPUs"
        )
    minutes = math.ceil(spec.hours * 60)
    options = {
        "job-name": spec.name,
        "nodes": spec.hosts,
        "ntasks-per-node": spec.processes,
        "gpus-per-node": spec.chips_per_host or None,
        "partition": spec.queue or None,
        "account": spec.account or None,
        "time": f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00",
        "signal": f"TERM@{spec.grace}",
        "output": f"{spec.name}-%j.log",
    }
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None),
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        shell.header(spec, "slurm"),
        "set -uo pipefail",
        *([f"cd {shlex.quote(spec.workdir)} || exit 2"] if spec.workdir else []),
        *shell.required(spec),
        *shell.rank(spec),
        "",
        "began=$(date +%s)",
        'echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"',
        f"srun --kill-on-bad-exit=1 --cpu-bind=none --ntasks={spec.hosts * spec.processes} bash -c {shell.CALL}",
        "status=$?",
        '[ "$status" != 0 ] || exit 0',
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {spec.restarts} ] && {shell.restart(spec)}; then',
        '  scontrol requeue "$SLURM_JOB_ID" && exit "$status"',
        "fi",
        'exit "$status"',
    ]
    return Artefact(
        f"{spec.name}.sbatch", "\n".join(lines) + "\n", ("sbatch", "{file}"),
        f"squeue --name={spec.name}; tail -F {spec.name}-*.log; {shell.line(spec.program, 'status', spec.folder)}",
        "scontrol update JobId=ID Requeue=0; scancel --signal=TERM ID  (with a checkpoint; scancel ID: at once)",
        "the same command", "SLURM's client commands, on a login node",
    )  # fmt: skip
