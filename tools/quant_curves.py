"""Does training in eight bits follow training in bf16? Loss curves of pretrain:tiny, paired over seeds.

    python -m tools.quant_curves --seeds 3 --out runs/quant --figure docs/quant.png

For each seed the same weights read the same tokens in the same order, once with compute in bf16 and once for each of
`--arms`: fp8 or int8 in the matmuls that `llama4_jax/quant.py` quantises (a CPU emulates both: the arithmetic is
theirs, the speed is not), or fp32, which shows how far rounding to bf16 alone moves a curve. Runs that are complete are
not run again.

A training curve is the loss of every step, smoothed by its mean over WINDOW steps; the difference of two curves is
|a - b| / b for each window, b being bf16's, and its largest is shown with the last step of that window. Prints a
Markdown table of the differences and of losses at the end (training: the last window; held out: evaluated in the arm's
own precision), and writes it with the numbers to OUT/quant.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

import configs
from launch.train import train
from training.metrics import read

ARMS = {
    "bf16": dict(compute_dtype="bfloat16"),
    "fp8": dict(compute_dtype="bfloat16", quant="fp8"),
    "int8": dict(compute_dtype="bfloat16", quant="int8"),
    "fp32": dict(compute_dtype="float32"),
}
BASE = "bf16"
WINDOW = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=["fp8"], choices=[arm for arm in ARMS if arm != BASE])
    parser.add_argument("--steps", type=int, help="in place of the preset's; the schedule shrinks with it")
    parser.add_argument("--out", default="runs/quant")
    parser.add_argument("--figure", metavar="FILE.png", help="also draw the curves of the first seed")
    args = parser.parse_args()
    curves, rows = {}, []
    for seed in range(args.seeds):
        curves |= {(arm, seed): run(arm, seed, args.steps, Path(args.out)) for arm in (BASE, *args.arms)}
        rows += [compare(arm, seed, curves[arm, seed], curves[BASE, seed]) for arm in args.arms]
    result = dict(window=WINDOW, rows=rows, largest={arm: largest(arm, rows) for arm in args.arms})
    (Path(args.out) / "quant.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.figure:
        Path(args.figure).write_bytes(figure({arm: curves[arm, 0]["loss"] for arm in (BASE, *args.arms)}))


def run(arm: str, seed: int, steps: int | None, out: Path) -> dict[str, Any]:
    """The run, to its end: `loss` of every step and the held-out loss at the end."""
    cfg = configs.find("pretrain:tiny")
    steps = steps or cfg.train.steps
    learners = {name: replace(learner, **ARMS[arm]) for name, learner in cfg.learners.items()}
    often = replace(cfg.train, seed=seed, steps=steps, log_every=1, eval_every=steps, checkpoint_every=steps)
    cfg = replace(cfg, learners=learners, train=often, out=str(out / f"{arm}-{seed}"))
    if not train(cfg)["complete"]:
        raise SystemExit(f"stopped in {cfg.out}; the same command goes on from there")
    records = read(epath.Path(cfg.out))
    return dict(loss=np.array([r["loss"] for r in records if "loss" in r]), held_out=records[-1]["eval/ce"])


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Means over WINDOW steps, one for each window that lies within the curve."""
    return np.convolve(loss, np.full(WINDOW, 1 / WINDOW), "valid")


def compare(arm: str, seed: int, ours: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    a, b = smoothed(ours["loss"]), smoothed(base["loss"])
    apart = np.abs(a - b) / b
    return dict(
        arm=arm, seed=seed, loss=a[-1], base_loss=b[-1], held_out=ours["held_out"], base_held_out=base["held_out"],
        apart=apart.max(), step=int(apart.argmax()) + WINDOW, apart_at_end=apart[-1],
    )  # fmt: skip


def largest(arm: str, rows: list[dict[str, Any]]) -> float:
    return max(row["apart"] for row in rows if row["arm"] == arm)


def table(result: dict[str, Any]) -> str:
    heads = ("arm", "seed", f"training loss, {BASE}", "arm", f"held out, {BASE}", "arm",
             "largest difference (at step)", "at the end")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        lines.append(f"| {row['arm']} | {row['seed']} | {row['base_loss']:.4f} | {row['loss']:.4f} | "
                     f"{row['base_held_out']:.4f} | {row['held_out']:.4f} | {row['apart']:.2%} ({row['step']}) | "
                     f"{row['apart_at_end']:.2%} |")  # fmt: skip
    return "\n".join(lines)


def figure(losses: dict[str, np.ndarray]) -> bytes:
    """PNG: the smoothed curves above, what divides each from bf16's below."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    from training.figures import COLORS, STYLE, WIDTH

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 4.4), layout="constrained", dpi=160)
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        base = smoothed(losses[BASE])
        steps = np.arange(len(base)) + WINDOW
        for i, (arm, loss) in enumerate(losses.items()):
            above.plot(steps, smoothed(loss), color=COLORS[i], linestyle="-" if i == 0 else (0, (4, 2)), label=arm)
            if arm != BASE:
                below.plot(steps, 100 * (smoothed(loss) / base - 1), color=COLORS[i])
        below.axhline(0, color=COLORS[0])
        above.set_ylabel("loss")
        above.legend()
        below.set_ylabel(f"% from {BASE}")
        below.set_ylim(-1, 1)
        below.set_xlabel("step")
        file = io.BytesIO()
        drawn.savefig(file, format="png")
        return file.getvalue()


if __name__ == "__main__":
    main()
