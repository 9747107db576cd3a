"""`llama4 checkpoint diff RUN[@STEP] RUN[@STEP]`: how two checkpoints differ."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN[@STEP]", help="a run's folder, and the step of a checkpoint (the newest)")
    parser.add_argument("second", metavar="RUN[@STEP]", help="another")
    parser.add_argument("--arrays", type=int, default=10, metavar="N", help="show the N that differ most (10)")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where everything is equal bit by bit, 1 where anything differs."""
    from training import fork
    from training.compare import differences

    places = [fork.parts(fork.find(name, option="checkpoint diff")) for name in (args.first, args.second)]
    found = differences(*places)
    if args.json:
        print(json.dumps(found))
        return 0 if found["equal"] else 1
    for name in ("config", "data", "shapes"):
        for line in found[name]:
            print(f"{name}: {line}")
    changed = sorted(found["arrays"].items(), key=lambda item: -item[1]["relative"])
    for name, of in changed[: args.arrays]:
        print(f"{name}: {of['entries']:,} of {of['size']:,} entries differ, by {of['relative']:.3g} of the norm")
    print(f"{len(changed)} arrays differ, {found['same']} are equal bit by bit")
    return 0 if found["equal"] else 1
