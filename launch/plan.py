"""`llama4 plan NAME --topology v5p:8x8x8`: what a run needs and how fast it can be, without its devices.

`llama4 plan distill NAME --topology ...` sets side by side where its teacher may stand; `llama4 plan serve NAME ...`
says whether a model fits with its key/value caches (`launch/plan_serve.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch import overrides, plan_serve

TAKES_OVERRIDES = True
GIB = 2**30
COMPILED_BY_SEARCH = 3


DISTILL: dict[str, Any] = dict(mfu=0.4, chip_hour=2.0, tb_month=20.0, runs=2)
"""Assumed where an option of `plan distill` is not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, also=", or the word distill or serve and one", nargs="*", action=_Name)
    parser.usage = f"{parser.prog} [distill|serve] NAME --topology KIND:SHAPE [--FIELD VALUE ...] [options]"
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE",
                        help="v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x8, h100:HOSTSx8 or 1x1, h200:...")  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fast", action="store_true", help="by formulas alone, in a few seconds; nothing is compiled")
    how.add_argument("--search", action="store_true",
                     help="rank meshes, remat and microbatches by formulas; compile the best three")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="with --search: the ranking alone")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-",
                        help="print the plan as JSON, or write it to FILE beside the printed lines")  # fmt: skip
    teacher = parser.add_argument_group(
        "distill", "compares a teacher that trains along, a frozen one, one on chips of its own, and recorded targets"
    )
    teacher.add_argument("--mfu", type=float, help=f"assumed of all programs (default: {DISTILL['mfu']})")
    assumed = "in any currency (default, an assumption:"
    teacher.add_argument("--chip-hour", type=float, metavar="PRICE",
                         help=f"of a chip and hour, {assumed} {DISTILL['chip_hour']:g})")  # fmt: skip
    teacher.add_argument("--tb-month", type=float, metavar="PRICE",
                         help=f"of keeping a TB for a month, {assumed} {DISTILL['tb_month']:g})")  # fmt: skip
    teacher.add_argument("--runs", type=int, help="of students over the same tokens, for which to say up to how many "
                         f"tokens recording pays (default: {DISTILL['runs']})")  # fmt: skip
    plan_serve.add_arguments(parser)


class _Name(argparse.Action):
    """NAME, or the word distill or serve and NAME."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        words = list(values or ())
        namespace.distill, namespace.serve = words[:1] == ["distill"], words[:1] == ["serve"]
        names = words[namespace.distill or namespace.serve :]
        if len(names) > 1:
            parser.error(f"one preset, not {' '.join(names)}")
        namespace.name = names[0] if names else ""


def run(args: argparse.Namespace) -> int:
    from launch.train import find

    cfg = overrides.apply(find(args.name), args)
    if args.no_compile and not args.search:
        raise ValueError("--no-compile goes with --search; for one plan there is --fast")
    stray = [name for name in ("learner", *plan_serve.SERVE) if getattr(args, name) is not None]
    if stray and not args.serve:
        raise ValueError(f"--{stray[0].replace('_', '-')} goes with plan serve {args.name}")
    given = {name: value for name in DISTILL if (value := getattr(args, name)) is not None}
    if given and not args.distill:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with plan distill {args.name}")
    if (args.distill or args.serve) and (args.fast or args.search):
        word = "distill" if args.distill else "serve"
        raise ValueError(f"plan {word} compiles nothing and searches for nothing: leave out --fast and --search")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}")
    from training.ahead import no_device_needed
    from training.plan import plan

    no_device_needed()
    if args.serve:
        return plan_serve.run(cfg, args)
    if args.distill:
        from training.distill_plan import compare

        result = compare(cfg, args.topology, **(DISTILL | given))
        lines = describe_distill(result)
    elif args.search:
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
    from training.plan import search

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
            made, why = _compiled(one, args.topology)
            lines += ["", f"compiled: {one['options'] or 'as it is'}", *(describe(made)[1:] if made else [f"  {why}"])]
            plans += [made] if made else []
        lines += ["", *_winner(cfg, args.topology, plans)]
    ranked = [dict(options=one["options"], step=one["roofline"].step, bound=one["roofline"].bound,
                   peak=one["memory"].peak) for one in found]  # fmt: skip
    return dict(preset=cfg.name, topology=args.topology, ranked=ranked, compiled=plans), lines


def _compiled(one: dict[str, Any], topology: str) -> tuple[dict[str, Any] | None, str]:
    """(the plan of one that was found, "") or (None, why its compiler refused it); what is not installed is raised."""
    import jax

    from training.ahead import check_compiler
    from training.plan import plan

    check_compiler(topology)
    _log(f"compiling: {one['options'] or 'as it is'}")
    try:
        return plan(one["cfg"], topology, log=_log) | dict(options=one["options"]), ""
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return None, f"does not compile: {' '.join(str(error).split())[:200]}"


def _winner(cfg: Any, topology: str, plans: list[dict[str, Any]]) -> list[str]:
    """The fastest of those that fit once compiled, and what it does better than the preset as it is."""
    from training.plan import plan

    fitting = [one for one in plans if one["memory"]["fits"]]
    if not fitting:
        return ["none of those compiled fits; the next ones by --no-compile"]
    best = min(fitting, key=lambda one: one["roofline"]["step"])
    lines, now = [f"take: llama4 train {cfg.name} {best['options']}".rstrip()], None
    try:
        now = plan(cfg, topology, fast=True) if best["options"] else None
    except ValueError as error:
        lines.append(f"  as it is it cannot run there: {error}")
    for what, of in (
        ("seconds a step, at least", lambda one: f"{one['roofline']['step']:.3g}, bound by {one['roofline']['bound']}"),
        ("FLOPs recomputed", lambda one: f"{one['flops']['again'] / one['flops']['once']:.0%}"),
        ("GiB sent a step", lambda one: f"{sum(row['wire'] for row in one['traffic']) / GIB:,.0f}"),
        ("GiB of a device", lambda one: f"{one['memory']['peak'] / GIB:.1f}"),
    ):
        against = f" (as it is, by formula: {of(now)})" if now else ""
        lines.append(f"  {what}: {of(best)}{against}")
    return lines


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
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory["parts"].items())
    lines.append(f"  beside them, estimated for {memory['learner']}: {parts}")
    if compiled:
        lines.append(f"  compiled in {compiled['compile']:.0f} s: arguments {compiled['arguments'] / GIB:.2f}, peak "
                     f"{compiled['peak'] / GIB:.2f} (estimated {memory['estimate'] / GIB:.2f})")  # fmt: skip
        lines += ["  largest of what lives beside the arguments where it holds most:"] * bool(compiled["buffers"])
        for one in compiled["buffers"]:
            where = f"  ({one['where']})" if one["where"] else ""
            lines.append(f"    {one['bytes'] / GIB:6.2f}  {one['what'] or 'unknown'}: {one['arrays'][:60]}{where}")
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
        "GiB a step of a device: sent, and what of it goes in",
        *_collectives(traffic),
        *_compiled_collectives(plan),
        "least seconds of a step, each alone: " + ", ".join(f"{k} {v:.3g}" for k, v in roof["seconds"].items()),
        f"  at {assumed['bf16'] / 1e12:.0f} TFLOP/s bf16, {assumed['hbm_rate'] / 1e9:.0f} GB/s of HBM, "
        f"{assumed['link'] / 1e9:.0f} GB/s a link, {assumed['network'] / 1e9:.1f} GB/s of network a chip",
        f"bound by {roof['bound']}: {roof['step']:.3g} s a step, {roof['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {roof['mfu']:.1%}; all overlapping, at peak rates: no run is faster",
        f"{run['steps']:,} steps, {run['tokens'] / 1e12:.3g}T tokens: {run['days']:.3g} days, "
        f"{run['chip_hours']:,.0f} chip-hours at least",
    ]  # fmt: skip
    return lines


def _collectives(rows: list[dict[str, Any]]) -> list[str]:
    return [f"  {row['wire'] / GIB:9.2f} {row['operand'] / GIB:9.2f}  {row['kind']} over {row['axes']}, {row['dtype']}"
            for row in rows if row["wire"] > 2**20]  # fmt: skip


def _compiled_collectives(plan: dict[str, Any]) -> list[str]:
    if "compiled" not in plan:
        return []
    if not (rows := plan["compiled"]["collectives"][:10]):
        return ["as compiled: the compiler wrote none down"]
    gpus = plan["topology"].startswith(("h100", "h200"))
    note = "" if gpus else "; a TPU's may write gathers and scatters as all_reduce"
    head = "as compiled, if each is sent as it is written, and every layer is of the kind that sends most"
    return [f"{head}{note}", *_collectives(rows)]


# --- Where a teacher may stand


def describe_distill(found: dict[str, Any]) -> list[str]:
    """The placements in lines."""
    flops, rates, tokens = found["flops"], found["assumed"], found["tokens"]
    body, head, taught = flops["body"], flops["head"], flops["taught"]
    rows = [["", "teacher", "students", "teacher", "students", "tokens/s", "s a step", "bound by", "GiB a device"]]
    for name, one in found["placements"].items():
        program, work = one["program"], (one["teacher_flops"], one["student_flops"])
        rows.append([
            name, *(f"{x / 1e9:.4g} ({x * tokens:.2g})" for x in work), _short(one["teacher_chip_hours"]),
            _short(one["student_chip_hours"]), _short(one["tokens_per_second"]), f"{program['step']:.3g}",
            program["bound"], f"{program['peak'] / GIB:.1f} of {program['hbm'] / GIB:.1f}",
        ])  # fmt: skip
    teach, trained = taught * head, 3 * (body + head)
    return [
        f"{found['preset']} on {found['topology']} ({found['chips']} chips): {found['teacher']} teaches "
        f"{' and '.join(found['students'])} over {_short(tokens)} tokens",
        f"GFLOP a token: forward through {found['teacher']} {body / 1e9:.4g}, its head {head / 1e9:.4g}; training the "
        f"rest on labels alone {flops['others'] / 1e9:.4g}",
        f"assumed: {rates['mfu']:.0%} MFU of {rates['peak'] / 1e12:.0f} TFLOP/s a chip, {rates['chip_hour']:g} a "
        f"chip-hour, {rates['tb_month']:g} a TB and month, reading and writing free",
        "",
        "GFLOP a token (FLOP of the run); chip-hours and tokens/s at that MFU; the students' program, at best",
        *_columns(rows),
        "  tap: the teacher trains, too. frozen: in the students' program. slice: on chips of its own, of all "
        f"{found['placements']['slice']['teacher_chips']:,.0f}",
        "  to keep pace. recorded: one pass of the teacher, one run of students, whose program is the one of slice.",
        f"A tap's forward pass is free only if the teacher is to be trained anyway, as it is "
        f"{'' if found['trains'] else 'not '}here: then teaching adds",
        f"  {teach / 1e9:.4g} GFLOP a token. Else its teacher costs {(trained + teach) / (body + teach):.2f} times a "
        "frozen one.",
        "",
        *_moved(found),
        "",
        *_recorded(found),
    ]  # fmt: skip


def _moved(found: dict[str, Any]) -> list[str]:
    sizes, tokens = [form["bytes"] for form in found["formats"].values()], found["tokens"] / 1e12
    small, large, hidden = min(sizes), max(sizes), found["hidden_bytes"]
    rate = large * found["placements"]["slice"]["tokens_per_second"] / 1e9
    sparse = f"{small:.0f} to {large:.0f} ({small * tokens:,.3g} to {large * tokens:,.3g}): sparse targets"
    return [
        "moved, bytes a token (TB of the run)",
        f"  tap, frozen  {hidden:,} ({hidden * tokens:,.3g}): hidden states in bf16, on the device where they are",
        f"  slice        {sparse} over the network, up to {rate:.3g} GB/s",
        f"  recorded     {sparse} written once, read by each run",
    ]


def _recorded(found: dict[str, Any]) -> list[str]:
    rows = [["recorded", "bytes a token", "TB", "GB/s read", "months kept", "recording", "keeping", "pays from run",
             f"{found['runs']} runs pay up to"]]  # fmt: skip
    for name, form in found["formats"].items():
        first, limit = form["runs_that_pay"], form["tokens_that_pay"]
        rows.append([
            name, f"{form['bytes']:.0f}", f"{form['stored'] / 1e12:,.3g}", f"{form['read_per_second'] / 1e9:.3g}",
            f"{form['months']:.3g}", _short(form["once"]), _short(form["kept"]),
            f"{first} ({_short(first * found['tokens'])})" if first else "never", f"{_short(limit)} tokens",
        ])  # fmt: skip
    return [
        *_columns(rows),
        f"  A frozen teacher in the students' program costs {_short(found['live_cost'])} a run. Brackets: tokens that "
        "students have then seen. Runs go",
        "  over the same tokens (an epoch is one), one after the other on all these chips; all targets are kept until "
        "the last ends.",
        "  Top-k targets are biased, those with draws are not.",
    ]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return [f"  {'  '.join(line)}" for line in lines]


def _short(number: float) -> str:
    """3 digits, in thousands, millions, billions or trillions."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.0f}{letter}" if number >= 100 * size else f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
