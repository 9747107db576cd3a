"""Does training in eight bits follow training in bf16? Loss curves of pretrain:tiny, paired over seeds.

    python -m tools.quant_curves --seeds 3 --out runs/quant --figure docs/quant.png

For each seed the same weights read the same tokens in the same order, once with compute in bf16 and once for each of
`--arms`: fp8 or int8 in the matmuls that `llama4_jax/quant.py` quantises (a CPU emulates both: the arithmetic is
theirs, the speed is not), or fp32, which shows how far rounding to bf16 alone moves a curve. Runs that are complete are
not run again.

A training curve is the loss of every step, smoothed by its mean over WINDOW steps; the difference of two curves is
a / b - 1 for each window, b being bf16's. Shown are the largest above and below bf16's (with the last step of that
window) and the one at the end; in the rows of means, for the curves averaged over seeds. Prints a Markdown table of
them and of losses at the end (training: the last window; held out: evaluated in the arm's own precision), and writes it
with the numbers to OUT/quant.json.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

import configs
from launch.train import train
from training.figures import COLORS, STYLE, WIDTH
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
    parser.add_argument("--arms", nargs="+", default=["fp8", "fp32"], choices=[arm for arm in ARMS if arm != BASE])
    parser.add_argument("--steps", type=int, help="in place of the preset's; the schedule shrinks with it")
    parser.add_argument("--out", default="runs/quant")
    parser.add_argument("--figure", metavar="FILE.png", help="also draw the curves")
    args = parser.parse_args()
    out, arms = Path(args.out), [BASE, *args.arms]
    runs = {arm: [run(arm, seed, args.steps, out) for seed in range(args.seeds)] for arm in arms}
    rows = [
        dict(arm=arm, seed=name) | compare(ours, base)
        for arm in args.arms
        for name, ours, base in zip(
            [*range(args.seeds), "mean"], averaged(runs[arm]), averaged(runs[BASE]), strict=True
        )
    ]
    (out / "quant.json").write_text(json.dumps(dict(window=WINDOW, rows=rows), indent=1))
    print(table(rows))
    if args.figure:
        Path(args.figure).write_bytes(figure(runs))


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


def averaged(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds, and behind them their mean."""
    return [*seeds, {key: np.mean([seed[key] for seed in seeds], axis=0) for key in seeds[0]}]


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Means over WINDOW steps, one for each window that lies within the curve."""
    return np.convolve(loss, np.full(WINDOW, 1 / WINDOW), "valid")


def compare(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    a, b = smoothed(ours["loss"]), smoothed(base["loss"])
    apart = a / b - 1
    return dict(
        loss=a[-1], base_loss=b[-1], held_out=ours["held_out"], base_held_out=base["held_out"],
        above=apart.max(), above_at=int(apart.argmax()) + WINDOW,
        below=apart.min(), below_at=int(apart.argmin()) + WINDOW, at_end=apart[-1],
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("arm", "seed", f"training loss, {BASE}", "arm", f"held out, {BASE}", "arm",
             "curve, most above (at step)", "most below", "at the end")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['base_loss']:.4f} | {row['loss']:.4f} | "
            f"{row['base_held_out']:.4f} | {row['held_out']:.4f} | {row['above']:+.2%} ({row['above_at']}) | "
            f"{row['below']:+.2%} ({row['below_at']}) | {row['at_end']:+.2%} |"
        )
    return "\n".join(lines)


def figure(runs: dict[str, list[dict[str, Any]]]) -> bytes:
    """PNG: above the smoothed curves, means over seeds; below each seed's distance from bf16's, and the means'."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH * 1.2, 4.4), layout="constrained")
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(1, 1))
        for i, (arm, seeds) in enumerate(runs.items()):
            *each, mean = (smoothed(s["loss"]) for s in averaged(seeds))
            *bases, base = (smoothed(s["loss"]) for s in averaged(runs[BASE]))
            steps = np.arange(len(mean)) + WINDOW
            above.plot(steps, mean, color=COLORS[i], linewidth=3.4 if arm == BASE else 1.5, label=arm)
            for ours, theirs in zip(each, bases, strict=True):
                below.plot(steps, 100 * (ours / theirs - 1), color=COLORS[i], linewidth=0.8, alpha=0.45)
            below.plot(steps, 100 * (mean / base - 1), color=COLORS[i], linewidth=3.4 if arm == BASE else 1.7)
        above.set_ylabel("loss, nats a token")
        above.legend()
        below.set_ylabel(f"% from {BASE}")
        below.set_xlabel("step")
        file = io.BytesIO()
        drawn.savefig(file, format="png", dpi=160, facecolor="white")
        return file.getvalue()


if __name__ == "__main__":
    main()
