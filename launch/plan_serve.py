"""`llama4 plan serve NAME --topology h100:1x1`: whether a model fits with its caches, and how fast it could be."""

from __future__ import annotations

import argparse
import json
from typing import Any

GIB = 2**30
SERVE: dict[str, Any] = dict(weights="bfloat16", context=[131_072, 1_048_576, 10_485_760], serve_batch=1, prefill=8192)
"""Where an option of `plan serve` is not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.export import QUANTISED

    serve = parser.add_argument_group("serve", "prefill and decode: weights as exported, caches over --mesh.context")
    serve.add_argument("--learner", help="which model, where the preset has several")
    serve.add_argument("--weights", choices=("bfloat16", "float32", *QUANTISED), metavar="FORM",
                       help=f"bfloat16 (default), float32, {', '.join(QUANTISED)}")  # fmt: skip
    serve.add_argument("--context", type=int, action="append", metavar="TOKENS",
                       help="may be given several times (default: 131072, 1048576, 10485760)")  # fmt: skip
    serve.add_argument("--serve-batch", type=int, metavar="ROWS", help="sequences at once (default: 1)")
    serve.add_argument("--prefill", type=int, metavar="TOKENS", help="of a prompt, read at once (default: 8192)")


def run(cfg: Any, args: argparse.Namespace) -> int:
    from training.checkpoint import which_learner
    from training.serving import serving

    given = {name: value if (value := getattr(args, name)) is not None else SERVE[name] for name in SERVE}
    name = which_learner(cfg, args.learner, args.name)
    model = cfg.learners[name].model
    beyond = [one for one in given["context"] if one > model.max_position]
    if args.context and beyond:
        raise ValueError(f"{name} reads at most {model.max_position:,} tokens, not --context {beyond[0]}")
    found = serving(
        model, args.topology, given["weights"], [one for one in given["context"] if one not in beyond],
        batch=given["serve_batch"], piece=given["prefill"], mesh=cfg.mesh,
    )  # fmt: skip
    found = dict(preset=cfg.name, learner=name) | found
    print(json.dumps(found) if args.json == "-" else "\n".join(describe(found)))
    if args.json not in (None, "-"):
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1) + "\n")
    return 0


def describe(found: dict[str, Any]) -> list[str]:
    """The plan in lines."""
    shares = [f"{found[key]} {of}" for key, of in (("context_shards", "to a context"), ("tensor", "to the heads"))
              if found[key] > 1]  # fmt: skip
    devices = f"{found['devices']} devices" if found["devices"] > 1 else "one device"
    rows = [["context", "caches", "working", "in all", "", "prefill", "decode, a token"]]
    for one in found["needs"]:
        rows.append([
            f"{one['context']:,}", *(f"{one[key] / GIB:.2f}" for key in ("cache", "working", "total")),
            "fits" if one["fits"] else "DOES NOT FIT", f"{one['prefill']:.3g} s", f"{1000 * one['decode']:.3g} ms",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = found["room"] * found["hbm"]
    longest = f"{found['longest']:,} tokens" if found["longest"] else "none: not one chunk"
    return [
        f"{found['learner']} of {found['preset']} on {found['topology']}: {', '.join([devices, *shares])}; "
        f"{found['batch']} sequence{'s' * (found['batch'] > 1)}, weights in {found['form']}",
        f"of a device, GiB: weights {found['weights'] / GIB:.2f}; {room / GIB:.1f} may be taken of "
        f"{found['hbm'] / GIB:.1f}",
        *("  " + "  ".join(map(str.rjust, row, widths)) for row in rows),
        f"longest context that fits: {longest}",
        "By formula, bf16 caches; times are the least that can be (peak rates, no traffic between devices).",
    ]
