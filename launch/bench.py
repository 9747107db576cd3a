"""`llama4 bench step NAME`: how fast a preset's step is here, on synthetic tokens of any shape; `llama4 bench distill
NAME`: what the teacher's part of it costs, and what the fused loss saves."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch import overrides

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("step", "distill"),
        help="step: the optimizer step, all learners of the preset; distill: the fused loss beside the "
        "naive one, and the step of teachers and students beside its parts",
    )
    overrides.add_name(parser)
    parser.usage = f"{parser.prog} step|distill NAME [--FIELD VALUE ...] [options]"
    parser.add_argument(
        "--loss",
        metavar="TOKENSxVOCABULARY",
        nargs="+",
        default=["1024x20480", "4096x20480"],
        help="of distill: shapes of the loss (default: 1024x20480 4096x20480)",
    )
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
    shapes = [_shape(text) for text in args.loss]
    if args.what == "distill" and not any(learner.distillation.teacher for learner in cfg.learners.values()):
        raise ValueError(f"{args.name} has no student: take one with a teacher, such as codistill:tiny")
    if args.what == "distill" and args.steps < 1:
        raise ValueError(f"a benchmark takes at least 1 step, not {args.steps}")
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # or compile_seconds would be those of reading a file
    result, lines = _step(cfg, args) if args.what == "step" else _distill(cfg, shapes, args)
    if args.json == "-":
        print(json.dumps(result))
    else:
        print("\n".join(lines))
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.json}", file=sys.stderr)
    return 0


def _step(cfg: Any, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from training.bench import bench_step

    result = bench_step(cfg, args.steps, args.warmup)
    return result, describe(result)


def _distill(cfg: Any, shapes: list[tuple[int, int]], args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from llama4_jax.kernels.vocab_loss.comparison import Comparison
    from training.bench_distill import bench_loss, bench_step_beside_parts

    name, student = next((name, x) for name, x in cfg.learners.items() if x.distillation.teacher)
    teacher = cfg.learners.get(student.distillation.teacher, student)
    widths = student.model.embed_dim, teacher.model.embed_dim
    lines = [f"loss of {name} (width {widths[0]}) and its teacher (width {widths[1]}), value and gradient, fp32"]
    losses = []
    for shape in shapes:
        for measure in (False, True):
            one = bench_loss(*shape, *widths, Comparison(student.distillation.divergence, measure=measure), args.steps)
            losses.append(one)
            what = "with statistics" if measure else "alone"
            seconds = {how: one["seconds"][how]["median"] for how in ("fused", "naive")}
            memory = {how: _size(one["temporaries"][how]) for how in ("fused", "naive")}
            lines.append(
                f"{shape[0]} x {shape[1]} {what}: {seconds['fused']:.3g} s fused, {seconds['naive']:.3g} naive "
                f"({one['time_ratio']:.2f}x); temporaries {memory['fused']} and {memory['naive']}"
            )
    step = bench_step_beside_parts(cfg, args.steps)
    for part, seconds in step["seconds"].items():
        lines.append(f"step, {part}: {seconds['median']:.4g} s  (range {_pair(seconds['range'], '.4g')})")
    lines.append(f"together over the sum of the parts: {step['overhead']:+.1%}")
    return dict(loss=losses, step=step), lines


def _shape(text: str) -> tuple[int, int]:
    tokens, x, vocabulary = text.partition("x")
    if not (x and tokens.isdecimal() and vocabulary.isdecimal() and int(tokens) and int(vocabulary)):
        raise ValueError(f"--loss takes TOKENSxVOCABULARY, such as 4096x20480, not {text!r}")
    return int(tokens), int(vocabulary)


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
