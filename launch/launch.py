"""`llama4 launch TARGET NAME`: renders what a scheduler needs to train NAME on several hosts, and submits it.

The run is checked first: its configuration, and whether it fits the devices that are asked for.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import overrides
from launch.render import TARGETS, render
from launch.render.job import Artefact, JobSpec, chips_per_host, valid_name

if TYPE_CHECKING:
    from training.config import RunConfig

TAKES_OVERRIDES = True
SHARED = ("local", "slurm", "mpi")
"""Targets whose hosts see this machine's files: its own llama4 is run, from this folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, TARGETS))
    parser.add_argument("target", metavar="TARGET", help="one of those below")
    overrides.add_name(parser, also=", or the folder of a run to go on with")
    parser.usage = f"{parser.prog} TARGET NAME --out DIR [--FIELD VALUE ...] [options]"
    table = "\n".join(f"  {name:{width}} {what}" for name, what in TARGETS.items())
    parser.epilog = f"targets:\n{table}\n\n{parser.epilog}\n\ndocs/launch.md has a page about each target."
    parser.add_argument("--from", dest="source", metavar="RUN[@STEP]", default="", help="as in llama4 train")
    parser.add_argument("--profile", metavar="steps=FIRST-LAST", default="", help="as in llama4 train")
    parser.add_argument("--track", action="append", default=[], metavar="KIND[:PROJECT]", help="as in llama4 train")
    parser.add_argument("--dry-run", action="store_true", help="print the file and the command; submit nothing")
    parser.add_argument("--json", action="store_true", help="print what --dry-run does as JSON; submit nothing")
    parser.add_argument("--keep", metavar="DIR", default="launches", help="where the file is kept (default: launches)")
    size = parser.add_argument_group("how many, and of what")
    size.add_argument("--topology", default="", metavar="KIND:SHAPE",
                      help="v5e:4x8, v5p:4x8x8, v6e:16x16, tpu7x:4x4x8, h100:HOSTSx8, h200:...; else CPUs")  # fmt: skip
    size.add_argument("--slices", type=int, default=1, metavar="N", help="of TPUs, each with the topology (default: 1)")
    size.add_argument("--hosts", type=int, metavar="N", help="default: what the topology and slices have, or 1")
    size.add_argument("--processes", type=int, default=1, metavar="N", help="on each host (default: 1)")
    size.add_argument("--devices", type=int, metavar="N", help="of each process (default: all chips of its host, or 1)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--name", dest="job", metavar="JOB", help="of the job (default: of the run's folder)")
    how.add_argument("--restarts", type=int, default=JobSpec.restarts, metavar="N",
                     help=f"at most, after failures that may pass (default: {JobSpec.restarts})")  # fmt: skip
    how.add_argument("--grace", type=int, default=JobSpec.grace, metavar="SECONDS", help="from the signal to the kill: "
                     f"longer than a step and a save, as llama4 status says (default: {JobSpec.grace})")  # fmt: skip
    how.add_argument("--hours", type=float, default=JobSpec.hours, help=f"slurm: at most (default: {JobSpec.hours:g})")
    how.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable; again for more")
    how.add_argument("--secret", action="append", default=[], metavar="NAME[=PLACE]", help="a variable whose value the "
                     "target finds: in jobset PLACE is SECRET/KEY, in tpu-vm a secret of Secret Manager, else it is "
                     "taken from the environment of who submits")  # fmt: skip
    how.add_argument("--port", type=int, default=JobSpec.port, help=f"of the first process (default: {JobSpec.port})")
    how.add_argument("--program", default="", help="llama4 as the hosts find it (default: this one, or llama4)")
    how.add_argument("--workdir", default="", help="folder to run in (default: this one where hosts see it)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--image", default="", help="jobset, xpk, sky: a container image; docker/ has Dockerfiles")
    where.add_argument("--queue", default="", help="slurm: partition; jobset: Kueue's local queue")
    where.add_argument("--account", default="", help="slurm")
    where.add_argument("--cluster", default="", help="xpk: the cluster; ray: the address of its dashboard")
    where.add_argument("--project", default="", help="tpu-vm, xpk")
    where.add_argument("--zone", default="", help="tpu-vm, xpk")
    where.add_argument("--hostfile", default="", metavar="FILE", help="mpi: a host a line")
    where.add_argument("--spot", action="store_true", help="sky, tpu-vm, jobset, xpk: machines that may be taken back")


def run(args: argparse.Namespace) -> int:
    if args.target not in TARGETS:
        near = difflib.get_close_matches(args.target, TARGETS, n=1, cutoff=0)[0]
        raise ValueError(f"no target {args.target!r}; the nearest is {near!r} (all: {', '.join(TARGETS)})")
    from launch.train import configuration, find

    # A run to begin from may lie where only the hosts can see it.
    cfg = overrides.apply(find(args.name), args) if args.source and args.name else configuration(args)
    spec = job(args, cfg)
    made = render(args.target, spec)
    check_mesh(cfg, spec)
    file = Path(args.keep) / made.file if made.text else None
    submit = [word.replace("{file}", str(file)) for word in made.submit]
    if args.json:
        print(json.dumps(dict(file=str(file or ""), text=made.text, submit=submit, watch=made.watch, stop=made.stop,
                              resume=made.resume)))  # fmt: skip
    elif args.dry_run:
        print(made.text, end="")
        print("\n".join(f"# {line}" for line in farewell(made, submit)))
    else:
        return _submit(made, submit, file, args.target)
    return 0


def job(args: argparse.Namespace, cfg: RunConfig) -> JobSpec:
    """The job that the options describe."""
    hosts, devices = _size(args)
    here = args.target in SHARED
    beside = Path(sys.executable).parent / "llama4"
    program = args.program or (str(beside) if here and beside.exists() else "llama4")
    folder = cfg.folder
    if here and "://" not in folder:
        folder = str(Path(folder).absolute())
    elif "://" not in folder and not folder.startswith("/"):
        raise ValueError(f"every host of {args.target} must see the run's folder, not a place beside it: --out "
                         f"gs://BUCKET/{folder}, or the absolute path of a shared one")  # fmt: skip
    argv = ["train", *([args.name] if args.name else []), *(["--from", args.source] if args.source else [])]
    argv += [*(["--profile", args.profile] if args.profile else []), *(w for t in args.track for w in ("--track", t))]
    words = [option for option in args.overrides if option[0] != "--out"]
    argv += [word for option in words for word in option] + ["--out", folder]
    return JobSpec(
        name=args.job or valid_name(folder.rstrip("/").rpartition("/")[2]), argv=tuple(argv), folder=folder,
        topology=args.topology, hosts=hosts, processes=args.processes, devices=devices, slices=args.slices,
        program=program, workdir=args.workdir or (str(Path.cwd()) if here else ""), image=args.image,
        env=tuple(_pair("--env", word) for word in args.env),
        secrets=tuple((name, place) for name, _, place in (word.partition("=") for word in args.secret)),
        grace=args.grace, restarts=args.restarts, hours=args.hours, port=args.port, queue=args.queue,
        account=args.account, cluster=args.cluster, project=args.project, zone=args.zone, spot=args.spot,
        hostfile=args.hostfile,
    )  # fmt: skip


def _size(args: argparse.Namespace) -> tuple[int, int]:
    """(hosts of all slices, devices of a process)."""
    if not args.topology:
        if args.slices > 1:
            raise ValueError("--slices are of TPUs: give --topology, e.g. v5p:4x4x8")
        return args.hosts or 1, args.devices or 1
    from training import chips

    devices = chips.devices(args.topology)
    kind, _, shape = args.topology.partition(":")
    chip, each = chips.CHIPS[kind], chips_per_host(kind, shape)
    if args.slices > 1 and not chip.torus:
        raise ValueError(f"--slices are of TPUs; more of {kind} are --topology {kind}:HOSTSx{chip.host}")
    if chip.torus and args.processes > 1:
        raise ValueError("a host of TPUs runs one process, which takes all of its chips: leave out --processes")
    hosts = args.slices * math.ceil(len(devices) / chip.devices / each)
    if args.hosts and args.hosts != hosts:
        raise ValueError(f"{args.topology}{f' in {args.slices} slices' if args.slices > 1 else ''} is {hosts} hosts of "
                         f"{each} chips, not --hosts {args.hosts}")  # fmt: skip
    if each % args.processes:
        raise ValueError(f"--processes {args.processes} do not share the {each} GPUs of a host evenly")
    own = each * chip.devices // args.processes
    if args.devices and args.devices != own:
        raise ValueError(f"each process of {args.topology} has {own} devices, not --devices {args.devices}")
    return hosts, own


def check_mesh(cfg: RunConfig, spec: JobSpec) -> None:
    """ValueError where the run's mesh, batch or model cannot be split over the job's devices and processes."""
    from training.ahead import no_device_needed
    from training.mesh import check_fits, make_mesh

    no_device_needed()
    devices = stand_ins(spec)
    stages = [cfg.at(done) for done in (0, *(stage.after for stage in cfg.stages))]
    for stage in [one for one in stages if one.mesh.suits(len(devices))] or stages[:1]:
        check_fits(stage, make_mesh(stage.mesh, devices))


def stand_ins(spec: JobSpec) -> list[Any]:
    """Devices like those of the job, each of the process that will have it."""
    from dataclasses import replace

    from training import chips

    if spec.platform == "cpu":
        total = spec.hosts * spec.processes * spec.devices
        return [chips.Device(i, "cpu", "cpu", (i, 0, 0), process_index=i // spec.devices) for i in range(total)]
    devices = chips.devices(spec.topology, spec.slices)
    if spec.platform == "gpu":
        return [replace(device, process_index=i // spec.devices) for i, device in enumerate(devices)]
    return devices


def farewell(made: Artefact, submit: list[str]) -> list[str]:
    """What to do with it, a line each."""
    return [f"submit: {shlex.join(submit)}", f"watch:  {made.watch}", f"stop:   {made.stop}", f"resume: {made.resume}"]


def _submit(made: Artefact, submit: list[str], file: Path | None, target: str) -> int:
    """Through the scheduler's own client, with what it prints."""
    if not shutil.which(submit[0]):
        raise FileNotFoundError(f"{submit[0]} is not on this machine's path: install {made.needs}, or take the file "
                                f"elsewhere (llama4 launch {target} ... --dry-run prints it)")  # fmt: skip
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made.text)
        file.chmod(0o755 if made.text.startswith("#!") else 0o644)
    print("\n".join(farewell(made, submit)), file=sys.stderr, flush=True)
    try:
        return subprocess.run(submit).returncode
    except KeyboardInterrupt:  # the client had it, too
        return 130


def _pair(option: str, word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{option} takes NAME=VALUE, not {word!r}")
    return name, value
