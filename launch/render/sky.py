"""SkyPilot: a managed job's task, which any of its clouds may run and run again."""

from __future__ import annotations

from typing import Any

import yaml

from launch.render import shell
from launch.render.job import Artefact, JobSpec
from training import exits

SKY_KINDS = {"v5e": "tpu-v5litepod", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "h100": "H100", "h200": "H200"}


def render(spec: JobSpec) -> Artefact:
    """`run` is executed on each node: SkyPilot says which one it is and where the others are.

    It starts a job again, on new machines, without a bound after a status that is listed here, or with one after any.
    Failures that may pass are to be told from those that would come again, and with a bound: so a node asks the run's
    folder (`llama4 status --restart`), and ends with the status that is listed, or with another. A machine that is
    taken back does not count towards `restarts`."""
    if spec.platform != "cpu" and spec.kind not in SKY_KINDS:
        raise ValueError(f"sky has no {spec.kind}; it runs on {', '.join(SKY_KINDS)} and CPUs")
    if spec.platform == "tpu" and spec.slices > 1:
        raise ValueError("sky runs on one slice of TPUs; for several use jobset or xpk")
    resources: dict[str, Any] = {"use_spot": spec.spot}
    if spec.platform == "gpu":
        resources["accelerators"] = f"{SKY_KINDS[spec.kind]}:{spec.chips_per_host}"
    elif spec.platform == "tpu":
        resources["accelerators"] = f"{SKY_KINDS[spec.kind]}-{spec.slice_name.rpartition('-')[2]}:1"
    resources["job_recovery"] = {
        "strategy": "EAGER_NEXT_REGION" if spec.spot else "FAILOVER", "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [exits.STOPPED],
    }  # fmt: skip
    if spec.image:
        resources["image_id"] = f"docker:{spec.image}"
    nodes = 1 if spec.platform == "tpu" else spec.hosts  # a slice of TPUs is one node to SkyPilot
    task: dict[str, Any] = {
        "name": spec.name,
        "resources": resources,
        "num_nodes": nodes,
        "workdir": spec.workdir or ".",
        "run": Block("\n".join(_run(spec)) + "\n"),
    }
    if not spec.image:
        extra = {"gpu": "[cuda]", "tpu": "[tpu]", "cpu": ""}[spec.platform]
        task["setup"] = Block(f"python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.{extra}'\n")
    if spec.secrets:
        task["secrets"] = {name: None for name, _ in spec.secrets}
    text = f"{shell.header(spec, 'sky')}\n" + yaml.dump(task, Dumper=Dumper, sort_keys=False, width=1000)
    secrets = [word for name, _ in spec.secrets for word in ("--secret", name)]
    return Artefact(
        f"{spec.name}.yaml", text, ("sky", "jobs", "launch", "--yes", "--detach-run", *secrets, "{file}"),
        f"sky jobs queue; sky jobs logs --name {spec.name}", f"sky jobs cancel --name {spec.name}",
        "the same command", "pip install 'skypilot[gcp]', or another cloud's extra",
    )  # fmt: skip


def _run(spec: JobSpec) -> list[str]:
    """A node's script: its processes beside each other, each with its number; then whether to start again."""
    path = [] if spec.image else ['export PATH="$PWD/.venv/bin:$PATH"']
    total = spec.hosts * spec.processes
    meet = [f'export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{spec.port}"',
            f"export JAX_NUM_PROCESSES={total}"]  # fmt: skip
    number = [f'export JAX_PROCESS_ID="$((SKYPILOT_NODE_RANK * {spec.processes} + $1))"']
    if spec.platform == "tpu":  # the workers of a slice find each other by Google's metadata
        meet, number = [], []
    return [
        *path, *meet, *shell.rank(spec, *number), "began=$(date +%s) pids=() status=0",
        "trap 'kill -TERM \"${pids[@]}\" 2>/dev/null' TERM INT",
        f'for ((i = 0; i < {spec.processes}; i++)); do (trap - TERM INT; rank "$i") & pids+=("$!"); done',
        'while [ -n "$(jobs -pr)" ]; do wait -n; done  # a signal ends a wait early',
        'for pid in "${pids[@]}"; do wait "$pid" || status=$?; done',
        '[ "$status" != 0 ] || exit 0',
        f"{shell.restart(spec, '--most', str(spec.restarts))} && exit {exits.STOPPED}",
        f'[ "$status" != {exits.STOPPED} ] || status={exits.FAILED}',
        'exit "$status"',
    ]  # fmt: skip


class Block(str):
    """Text of several lines, to be written as such."""


class Dumper(yaml.SafeDumper):
    """PyYAML's safe one, with scripts as blocks and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: Block) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")


Dumper.add_representer(Block, _block)
