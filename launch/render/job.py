"""What is to be run where, whoever runs it: one description, from which each target's file is rendered.

Nothing here knows a scheduler. Names and folders that a file carries unquoted are held to a plain alphabet here, words
of the command and values of the environment may be anything, and are quoted (or set by a YAML library) where they go.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from training.chips import CHIPS

NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
PATH = r"[A-Za-z0-9._/:@+=~-]{1,512}"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)(_|$)", re.IGNORECASE)
PORT = 8482


class Kind(NamedTuple):
    """What clouds call a kind of chips."""

    gke: str
    """Value of the node label that asks for it."""
    vm: str
    """How the name of a slice begins, before its number of `units`; empty where no such VMs are let."""
    units: int = 1
    """Of a chip in that number: v5p and tpu7x count cores."""
    runtime: str = ""
    """A TPU VM's system image."""


# The labels and machine shapes of GKE's pages on TPUs and GPUs, the names and images of Cloud TPU's pages on VMs.
KINDS = {
    "v5e": Kind("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Kind("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Kind("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Kind("tpu7x", "", 2),
    "h100": Kind("nvidia-h100-mega-80gb", ""),
    "h200": Kind("nvidia-h200-141gb", ""),
}


@dataclass(frozen=True)
class JobSpec:
    """A command of this program, run by every process of a job."""

    name: str
    """Of the job: lower-case letters, digits and hyphens."""
    argv: tuple[str, ...]
    """What follows `llama4`."""
    folder: str
    """Of the run, seen by every host."""
    topology: str = ""
    """As of `llama4 plan`: v5p:4x8x8, h100:32x8; empty for CPUs."""
    hosts: int = 1
    """Of all slices."""
    processes: int = 1
    """On each host."""
    devices: int = 1
    """Of each process."""
    slices: int = 1
    """Of TPUs, each with the topology."""
    program: str = "llama4"
    """The command, as a host finds it."""
    workdir: str = ""
    """Folder to run in; empty: where the scheduler starts it."""
    image: str = ""
    """Of a container."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables and their values; XLA_FLAGS is added to, not put in place of what a host has."""
    secrets: tuple[tuple[str, str], ...] = ()
    """Variables, and where each target finds their values."""
    grace: int = 600
    """Seconds from the signal to the kill; longer than a step and a save."""
    restarts: int = 10
    """At most so many, of failures that may pass."""
    hours: float = 24.0
    """The longest a scheduler may let it run, where it asks."""
    port: int = PORT
    """On which the first process is met."""
    queue: str = ""
    """SLURM's partition, or Kueue's queue."""
    account: str = ""
    """SLURM's."""
    cluster: str = ""
    """xpk's or Ray's."""
    project: str = ""
    zone: str = ""
    spot: bool = False
    """On machines that may be taken back."""
    hostfile: str = ""
    """mpirun's."""

    def __post_init__(self):
        _check(bool(re.fullmatch(NAME, self.name)), f"--name {self.name!r} must be lower-case letters, digits and "
               f"hyphens, at most 40, from a letter on; the nearest is {valid_name(self.name)!r}")  # fmt: skip
        for option, value, what in (
            ("--out", self.folder, PATH), ("--program", self.program, PATH), ("--workdir", self.workdir, PATH),
            ("--image", self.image, PATH), ("--hostfile", self.hostfile, PATH), ("--queue", self.queue, WORD),
            ("--account", self.account, WORD), ("--cluster", self.cluster, PATH), ("--project", self.project, PATH),
            ("--zone", self.zone, WORD),
        ):  # fmt: skip
            plain = "letters, digits and any of . _ -" + " / : @ + = ~" * (what == PATH)
            _check(not value or bool(re.fullmatch(what, value)), f"{option} {value!r} must be of {plain}")
            _check(not value.startswith("-"), f"{option} {value!r} must not begin with a hyphen")
        _check(bool(self.folder), "a job needs the run's folder: --out DIR, on storage that every host sees")
        for option in ("hosts", "processes", "devices", "slices"):
            value = getattr(self, option)
            _check(value >= 1, f"--{option} must be at least 1, not {value}")
        _check(1024 <= self.port <= 65535, f"--port lies between 1024 and 65535, not {self.port}")
        _check(30 <= self.grace <= 86400, f"--grace lies between 30 and 86400 seconds, not {self.grace}")
        _check(0 <= self.restarts <= 1000, f"--restarts lies between 0 and 1000, not {self.restarts}")
        _check(0 < self.hours <= 8760, f"--hours lies between 0 and 8760, not {self.hours:g}")
        for name, value in self.env:
            _check(bool(re.fullmatch(VARIABLE, name)), f"--env {name!r} is not the name of a variable")
            _check("\0" not in value, f"--env {name} holds a NUL, which no environment can")
            _check(not SECRET.search(name), f"--env {name} would write a secret into a file: give --secret {name}")
        for name, place in self.secrets:
            _check(bool(re.fullmatch(VARIABLE, name)), f"--secret {name!r} is not the name of a variable")
            _check(not place or bool(re.fullmatch(PATH, place)), f"--secret {name}={place!r}: no name of a secret")
        _check(not any("\0" in word for word in self.argv), "a word of the command holds a NUL")

    @property
    def kind(self) -> str:
        """Of its chips: v5p, h100 ..., or cpu."""
        return self.topology.partition(":")[0] or "cpu"

    @property
    def shape(self) -> str:
        return self.topology.partition(":")[2]

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return "cpu" if self.kind == "cpu" else "tpu" if CHIPS[self.kind].torus else "gpu"

    @property
    def chips_per_host(self) -> int:
        return chips_per_host(self.kind, self.shape) if self.topology else 0

    @property
    def slice_name(self) -> str:
        """v5p-512, what clouds call a slice of this kind and size."""
        kind = KINDS[self.kind]
        return f"{kind.vm or self.kind}-{math.prod(map(int, self.shape.split('x'))) * kind.units}"

    @property
    def planned(self) -> dict[str, str]:
        """What start-up holds the job against (`launch/preflight.py`)."""
        total = self.hosts * self.processes
        return {"LLAMA4_HOSTS": f"{self.hosts}", "LLAMA4_PROCESSES": f"{total}",
                "LLAMA4_DEVICES": f"{total * self.devices}"}  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """A target's file, and what a person does with it. Commands are for a shell, as printed."""

    file: str
    """Its name."""
    text: str
    submit: tuple[str, ...]
    """The scheduler's own client and its words; {file} stands for the file's path."""
    watch: str
    stop: str
    resume: str
    needs: str = ""
    """What to install where the client is missing."""


def chips_per_host(kind: str, shape: str) -> int:
    """Of the machines that a topology consists of; v5e and v6e come by 1, 4 or 8, and in larger ones by 4."""
    sizes = [int(n) for n in shape.split("x")]
    if kind not in ("v5e", "v6e"):
        return min(CHIPS[kind].host, math.prod(sizes)) if CHIPS[kind].torus else sizes[1]
    return math.prod(sizes) if math.prod(sizes) <= 8 else 4


def valid_name(name: str) -> str:
    """The nearest that is allowed."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:40].strip("-")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
