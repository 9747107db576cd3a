"""Does the teacher help? The distilled students against the same students from labels alone, paired over seeds.

    python -m tools.paired_seeds --seeds 3 --out runs/paired

For each seed a student starts from the same weights and reads the same tokens in the same order, once with the frozen
teacher (preset codistill:tiny) and once without (pretrain:tiny). The teacher is trained once (its own preset, its own
order of the documents). What differs is the soft targets. Runs that are complete are not run again.

Prints a Markdown table of held-out losses in nats a token and their paired differences, with the mean and the 95 %
interval of Student's t over seeds, and writes it with the numbers to OUT/paired.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import configs
from launch.train import train

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % point of Student's t for n seeds (n - 1 degrees of freedom)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T95))
    parser.add_argument("--out", default="runs/paired")
    args = parser.parse_args()
    out = Path(args.out)
    teacher = finish(replace(configs.find("pretrain:tiny_behemoth_teacher"), out=str(out / "behemoth")))
    rows = [one_seed(seed, out) for seed in range(args.seeds)]
    differences = [row["distilled"] - row["labels"] for row in rows]
    mean = statistics.mean(differences)
    half = T95[len(rows)] * statistics.stdev(differences) / len(rows) ** 0.5
    result = dict(teacher=teacher["eval/ce"], rows=rows, mean=mean, interval=[mean - half, mean + half])
    (out / "paired.json").write_text(json.dumps(result, indent=1))
    print(table(result))


def one_seed(seed: int, out: Path) -> dict[str, Any]:
    """Held-out losses of Scout with and without the teacher, and of Maverick with it."""
    alone = configs.find("pretrain:tiny")
    taught = configs.find("codistill:tiny")
    behemoth = replace(taught.learners["behemoth"], init=f"run:{out / 'behemoth'}")
    taught = replace(taught, learners=taught.learners | {"behemoth": behemoth})
    at_seed = replace(alone.train, seed=seed)
    labels = finish(replace(alone, train=at_seed, out=str(out / f"labels-{seed}")))
    distilled = finish(replace(taught, train=at_seed, out=str(out / f"distilled-{seed}")))
    return dict(seed=seed, labels=labels["eval/ce"], distilled=distilled["scout/eval/ce"],
                maverick=distilled["maverick/eval/ce"])  # fmt: skip


def finish(cfg) -> dict[str, Any]:
    """The last record of the run, run to its end."""
    summary = train(cfg)
    if not summary["complete"]:
        raise SystemExit(f"stopped in {summary['folder']}; the same command goes on from there")
    return summary["metrics"]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| seed | Scout, labels alone | Scout, distilled | difference | Maverick, distilled |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        difference = row["distilled"] - row["labels"]
        lines.append(f"| {row['seed']} | {row['labels']:.4f} | {row['distilled']:.4f} | {difference:+.4f} | "
                     f"{row['maverick']:.4f} |")  # fmt: skip
    low, high = result["interval"]
    lines.append(f"| mean | | | **{result['mean']:+.4f}** (95 %: {low:+.4f} to {high:+.4f}) | |")
    return "\n".join([*lines, "", f"Teacher, held out: {result['teacher']:.4f}"])


if __name__ == "__main__":
    main()
