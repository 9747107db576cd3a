"""`llama4 plan NAME --topology v5p:8x8x8`: what a run needs and how fast it can be, without its devices."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch import overrides

TAKES_OVERRIDES = True
GIB = 2**30
COMPILED_BY_SEARCH = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser)
    parser.usage = f"{parser.prog} NAME --topology KIND:SHAPE [--FIELD VALUE ...] [options]"
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE",
                        help="v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x8, or h100:HOSTSx8")  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fast", action="store_true", help="by formulas alone, in a second or two; nothing is compiled")
    how.add_argument("--search", action="store_true",
                     help="rank meshes, remat and microbatches by formulas; compile the best three")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="with --search: the ranking alone")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-",
                        help="print the plan as JSON, or write it to FILE beside the printed lines")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from launch.train import find

    cfg = overrides.apply(find(args.name), args)
    if args.no_compile and not args.search:
        raise ValueError("--no-compile goes with --search; for one plan there is --fast")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}")
    from training.ahead import no_device_needed
    from training.plan import plan

    no_device_needed()
    if args.search:
        result, lines = _search(cfg, args)
    else:
        result = plan(cfg, args.topology, args.fast, log=_log)
        lines = describe(result)
    if args.json == "-":
        print(json.dumps(result))
    else:
        print("\n".join(lines))
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        _log(f"written to {args.json}")
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _search(cfg: Any, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from training.plan import plan, search

    found = search(cfg, args.topology)
    if not found:
        raise ValueError(f"{cfg.name} fits on {args.topology} under no mesh, remat policy or microbatches tried: "
                         "take more devices, a shorter row, or --optimizer.moment-dtype bfloat16")  # fmt: skip
    lines = [f"{len(found)} ways fit; the fastest by their roofline (formulas):"]
    for one in found[:10]:
        roof = one["roofline"]
        lines.append(f"  {roof.step:8.3g} s a step, bound by {roof.bound:8} {one['memory'].peak / GIB:6.1f} GiB   "
                     f"{one['options'] or 'as it is'}")  # fmt: skip
    plans = []
    if not args.no_compile:
        for one in found[:COMPILED_BY_SEARCH]:
            _log(f"compiling: {one['options'] or 'as it is'}")
            plans.append(plan(one["cfg"], args.topology, log=_log) | dict(options=one["options"]))
            lines += ["", f"compiled: {one['options'] or 'as it is'}", *describe(plans[-1])[1:]]
        fitting = [p for p in plans if p["memory"]["fits"]]
        best = min(fitting, key=lambda p: p["roofline"]["step"], default=None)
        lines += ["", "none of the three fits once compiled; the next ones by --no-compile" if best is None else
                  f"take: llama4 train {cfg.name} {best['options']}".rstrip()]  # fmt: skip
        if best:
            lines.append(
                f"      its step is bound by {best['roofline']['bound']}, at {best['roofline']['mfu']:.0%} MFU"
            )
    ranked = [dict(options=one["options"], step=one["roofline"].step, bound=one["roofline"].bound,
                   peak=one["memory"].peak) for one in found]  # fmt: skip
    return dict(preset=cfg.name, topology=args.topology, ranked=ranked, compiled=plans), lines


def describe(plan: dict[str, Any]) -> list[str]:
    """The plan in lines."""
    axes = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    lines = [f"{plan['preset']} on {plan['topology']}: {plan['devices']} devices, {axes}; "
             f"{plan['batch']} rows of {plan['seq_len']:,} tokens"]  # fmt: skip
    for name, how in plan["learners"].items():
        words = ", ".join(f"{key} {value}" for key, value in how.items() if key != "trains")
        lines.append(f"  {name}: {'' if how['trains'] else 'frozen, '}{words}")
    lines += ["", *_memory(plan), "", *_time(plan)]
    return lines


def _memory(plan: dict[str, Any]) -> list[str]:
    memory, compiled = plan["memory"], plan.get("compiled")
    lines = ["memory of a device, GiB"]
    for name, parts in memory["state"].items():
        lines.append(f"  {name:24} weights {parts['weights'] / GIB:6.2f}, optimizer {parts['optimizer'] / GIB:6.2f}")
    if compiled:
        sizes = f"arguments {compiled['arguments'] / GIB:.2f}, peak {compiled['peak'] / GIB:.2f}"
        lines.append(f"  {sizes} (compiled in {compiled['compile']:.0f} s; estimated {memory['estimate'] / GIB:.2f})")
        lines += [f"    {b['bytes'] / GIB:6.2f}  {b['what'] or b['arrays'][:60]}" for b in compiled["buffers"]]
    else:
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory["parts"].items())
        lines.append(f"  beside them, estimated for {memory['learner']}: {parts}")
    lines.append(
        f"  {'fits' if memory['fits'] else 'DOES NOT FIT'}: {memory['peak'] / GIB:.1f} of {memory['hbm'] / GIB:.1f}"
    )
    if better := memory.get("next"):
        lines.append(f"  what would lower it most: {better['option']} (estimated {better['peak'] / GIB:.1f})")
    return lines


def _time(plan: dict[str, Any]) -> list[str]:
    flops, roof, run = plan["flops"], plan["roofline"], plan["run"]
    assumed, traffic = roof["assumed"], plan["traffic"][:10]
    lines = [
        f"FLOPs of a device: {flops['once']:.4g} and {flops['again']:.4g} recomputed; "
        f"{flops['model'] / plan['devices']:.4g} by hand",
        "sent by a device, GiB a step:",
        *(f"  {row['wire'] / GIB:9.2f}  {row['kind']} over {row['axes']}, {row['dtype']}" for row in traffic),
        "least seconds of a step, each alone: " + ", ".join(f"{k} {v:.3g}" for k, v in roof["seconds"].items()),
        f"  at {assumed['bf16'] / 1e12:.0f} TFLOP/s bf16, {assumed['hbm_rate'] / 1e9:.0f} GB/s of HBM, "
        f"{assumed['link'] / 1e9:.0f} GB/s a link, {assumed['network'] / 1e9:.1f} GB/s of network a chip",
        f"bound by {roof['bound']}: {roof['step']:.3g} s a step, {roof['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {roof['mfu']:.1%}; all overlapping, at peak rates: no run is faster",
        f"{run['steps']:,} steps, {run['tokens'] / 1e12:.3g}T tokens: {run['days']:.3g} days, "
        f"{run['chip_hours']:,.0f} chip-hours at least",
    ]  # fmt: skip
    return lines
