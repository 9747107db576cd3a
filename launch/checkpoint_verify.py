"""`llama4 checkpoint verify RUN[@STEP]`: every file of a checkpoint, of all by default, against its manifest."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[@STEP]", help="a run's folder, and the step of a checkpoint (default: all)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where all of them are good, 1 where one is not, or there is none."""
    from etils import epath

    from training import fork
    from training.checkpoint import Checkpoints

    named = "@" in args.run and not epath.Path(args.run).exists()
    folder, step = fork.parts(fork.find(args.run, option="checkpoint verify")) if named else (args.run, None)
    with Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps if step is None else [step]
        found = {at: checkpoints.problems(at) for at in steps}
    if args.json:
        print(json.dumps(dict(run=folder, steps=[dict(step=at, problems=lines) for at, lines in found.items()])))
    for at, lines in () if args.json else found.items():
        print(f"{folder}@{at}: {'; '.join(lines) if lines else 'good'}")
    if not found and not args.json:
        print(f"{folder}: no complete checkpoint")
    return 0 if found and not any(found.values()) else 1
