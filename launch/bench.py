"""`llama4 bench step NAME`: how fast a preset's step is here, on synthetic tokens of any shape."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch import overrides

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("step",), help="step: the optimizer step, all learners of the preset")
    overrides.add_name(parser)
    parser.usage = f"{parser.prog} step NAME [--FIELD VALUE ...] [options]"
    parser.add_argument("--batch", metavar="N", help="rows of a step, over all devices: --train.batch")
    parser.add_argument("--seq", metavar="N", help="tokens of a row: --train.seq-len")
    parser.add_argument("--at", metavar="STEP", type=int, default=0, help="of a run in stages: the one after this step")
    parser.add_argument("--steps", type=int, default=10, help="steps to time (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-",
                        help="print the result as JSON, or write it to FILE beside the printed lines")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from launch.train import find

    shape = [[field, value] for field, value in (("--train.batch", args.batch), ("--train.seq-len", args.seq)) if value]
    args.overrides += shape
    cfg = overrides.apply(find(args.name), args).at(args.at)
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}")
    import jax

    from training.bench import bench_step

    jax.config.update("jax_enable_compilation_cache", False)  # or compile_seconds would be those of reading a file
    result = bench_step(cfg, args.steps, args.warmup)
    if args.json == "-":
        print(json.dumps(result))
    else:
        print("\n".join(describe(result)))
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.json}", file=sys.stderr)
    return 0


def describe(result: dict[str, Any]) -> list[str]:
    """The result in lines."""
    rate, seconds, memory = result["tokens_per_second"], result["step_seconds"], result["memory"]
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    program = ", ".join(f"{kind}s {_size(n)}" for kind, n in memory["program"].items() if kind in ("argument", "temp"))
    axes = " x ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{result['preset']}: {result['batch']} rows of {result['seq_len']} tokens, {result['steps']} steps on "
        f"{axes} ({result['device']}), jax {result['jax']}",
        f"tokens/s    {rate['median']:,.0f}  (quartiles {_pair(rate['quartiles'], ',.0f')}, "
        f"range {_pair(rate['range'], ',.0f')})",
        f"step        {seconds['median']:.4g} s  (range {_pair(seconds['range'], '.4g')})",
        f"compile     {result['compile_seconds']['trace']:.1f} s tracing, "
        f"{result['compile_seconds']['compile']:.1f} s compiling",
        f"memory      peak {_size(memory['peak'])} of the {memory['peak_of']}; the step's {program} a device",
        f"model       {result['model_tflops']:.4g} TFLOP a step, "
        f"{result['tflops_per_second_and_device']:.3g} TFLOP/s a device{mfu}",
    ]
    for name, learner in result["learners"].items():
        how = ", ".join(f"{key} {value}" for key, value in learner["runs"].items())
        lines += [f"{name}: {learner['parameters']:,} parameters; {how}"]
    return lines


def _pair(values: list[float], form: str) -> str:
    return " to ".join(format(value, form) for value in values)


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
