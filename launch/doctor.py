"""`llama4 doctor`: what is installed, which devices there are, and how fast they are against their data sheets.

On one host, or on those of a job: `srun llama4 doctor pretrain:scout_8k --out RUN`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launch import overrides

TAKES_OVERRIDES = True
PINS = Path(__file__).resolve().parent.parent / "constraints.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, "pretrain:tiny", also=", or a run's folder, whose mesh axes and storage are measured")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default: 1)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    from launch import distributed
    from launch.train import find

    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, not {args.seconds:g}")
    cfg = overrides.apply(find(args.name), args)
    place = distributed.initialize(cfg)
    from training import doctor
    from training.mesh import make_mesh

    found = doctor.examine(make_mesh(cfg.mesh), cfg.out, args.seconds)
    found["advice"] = doctor.advice(found, PINS)
    if place.process == 0:
        print(json.dumps(found) if args.json else "\n".join(describe(found)))
    return 0


def describe(found: dict[str, Any]) -> list[str]:
    """What was found, a line a kind."""
    host, device, storage = found["host"], found["devices"], found["storage"]
    many = f", {device['processes']} processes" * (device["processes"] > 1)
    memory = f", {device['memory'] / 1e9:.1f} GB each" if device["memory"] else ""
    facts = [
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("host", f"{host['name']}, {host['cores']} cores, {host['memory'] / 1e9:.1f} GB"),
        ("devices", f"{device['count']} x {device['kind']} ({device['platform']}){memory}{many}"),
        *(("variable", f"{name}={value}") for name, value in found["variables"].items()),
        ("matmul", f"{_rate(found['rates']['matmul'], 1e12, 'TFLOP/s')}, bfloat16"),
        ("memory", _rate(found["rates"]["memory"], 1e9, "GB/s")),
        *((f"{axis} axis", f"{rate / 1e9:.3g} GB/s received by each device of an all-gather")
          for axis, rate in found["collectives"].items()),
        *([("storage", f"{storage['write'] / 1e9:.3g} GB/s written, {storage['read'] / 1e9:.3g} GB/s read back, in "
           f"{storage['folder']}")] if storage else []),
        *(("advice", line) for line in found["advice"] or ["none: nothing amiss was found"]),
    ]  # fmt: skip
    width = max(len(name) for name, _ in facts)
    return [f"{name:{width}}  {text}" for name, text in facts]


def _rate(rate: dict[str, Any], unit: float, name: str) -> str:
    sheet = f", {rate['share']:.0%} of the data sheet's {rate['sheet'] / unit:,.0f}" if rate["sheet"] else ""
    return f"{rate['value'] / unit:.3g} {name}{sheet}"
