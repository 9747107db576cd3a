"""`llama4 checkpoint seal RUN@STEP`: a manifest for a checkpoint that has none, of files as they are now.

For runs of versions that wrote none, and for one whose manifest alone was lost: what changed before is not found out.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN@STEP", help="a run's folder, and the step of a checkpoint")


def run(args: argparse.Namespace) -> int:
    from etils import epath

    from training import manifest

    folder, at, step = args.run.rpartition("@")
    if not at or not step.isdecimal():
        raise ValueError(f"checkpoint seal takes RUN@STEP, a step being a whole number, not {args.run!r}")
    place = epath.Path(folder) / "checkpoints" / step
    if not place.exists():
        raise FileNotFoundError(f"no checkpoint of step {step}: {place} does not exist")
    if (place / manifest.FILE).exists():
        raise ValueError(f"{place} has a manifest: llama4 checkpoint verify {args.run}")
    if missing := [item for item in ("state", "data", "run") if not (place / item).exists()]:
        raise ValueError(f"{place} lacks {missing[0]}: the save was broken off, and cannot be made whole")
    manifest.write(place)
    print(f"{args.run}: {len(manifest.read(place))} files, sealed as they are")
    return 0
