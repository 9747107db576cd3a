"""`llama4 diff A B`: two checkpoints of any kind, weight by weight."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="RUN, RUN@STEP, or a folder in Hugging Face's format")
    parser.add_argument("--learner", help="which model of the runs that have several")
    parser.add_argument("--tolerance", type=float, default=0.0,
                        help="of max |a - b| / max |b| (default: 0, all must be equal)")  # fmt: skip
    parser.add_argument("--rounded", action="store_true", help="equal means equal once both are rounded to bfloat16")
    parser.add_argument("--all", action="store_true", help="show every weight, not one line for each layer")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where they are equal, or within the tolerance; else 1."""
    from training import diff
    from training.weights import open_weights

    a, b = (open_weights(place, args.learner) for place in (args.a, args.b))
    other = diff.settings(a.cfg, b.cfg)
    found = []
    for one in diff.compare(a, b, args.rounded):
        found.append(one)
        if args.all and not args.json:
            print(_line(one), flush=True)
    beyond = [one for one in found if not (one.equal or one.relative <= args.tolerance)]
    if args.json:
        print(json.dumps(dict(a=a.where, b=b.where, settings=other, equal=not beyond and not other,
                              weights=[one._asdict() for one in found])))  # fmt: skip
        return 1 if beyond or other else 0
    if not args.all:
        for layer in dict.fromkeys(one.layer for one in found):
            of_layer = [one for one in found if one.layer == layer]
            print(_line(max(of_layer, key=lambda one: (not one.equal, one.relative))))
    for line in other:
        print(f"the models differ: {line}")
    same = sum(one.equal for one in found)
    how = "equal once rounded to bfloat16" if args.rounded else "equal, bit for bit"
    print(f"{a.where} and {b.where}: {same} of {len(found)} weights {how}"
          + (f"; the first that is not: {_line(beyond[0])}" if beyond else ""))  # fmt: skip
    return 1 if beyond or other else 0


def _line(one) -> str:
    where = f"layer {one.layer}: " if one.layer is not None else ""
    what = "equal" if one.equal else f"max |a - b| = {one.largest:.3g}, {one.relative:.2e} of max |b|"
    return f"{where}{one.name}: {what}"
