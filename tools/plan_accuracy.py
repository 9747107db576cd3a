"""How far `llama4 plan --fast` is from what compilers report: fits its factors, and writes docs/plans/accuracy.md.

    python -m tools.plan_accuracy add FILE...   # lines of tools.compile_steps into docs/plans/compiled.json
    python -m tools.plan_accuracy               # the fit, and the table

Every second program of a platform, in the order of their names, is fitted to, the others are held out. The factors it
prints belong into `training/memory.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import nnls

from llama4_jax.config import MODELS
from tools.compile_steps import GIB, MORE, PROGRAMS
from training import memory
from training.chips import devices
from training.config import Learner, RunConfig, TrainConfig
from training.mesh import make_mesh
from training.state import abstract_state

PLANS = Path(__file__).resolve().parent.parent / "docs" / "plans"
COMPILED, TABLE = PLANS / "compiled.json", PLANS / "accuracy.md"
PULL, PULL_SAVED = 0.1, 1.0
KEPT = ("program", "reduce_dtype", "arguments", "temporaries", "peak", "compile_s", "cpu_s")


def add(files: list[str]) -> None:
    """Records replace those of the same program and dtype of reduction."""
    records = (
        {(r["program"], r["reduce_dtype"]): r for r in json.loads(COMPILED.read_text())} if COMPILED.exists() else {}
    )
    for file in files:
        for line in Path(file).read_text().splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                records[found["program"], found["reduce_dtype"]] = {name: found[name] for name in KEPT}
    rows = ",\n".join(json.dumps(records[key]) for key in sorted(records))
    PLANS.mkdir(exist_ok=True)
    COMPILED.write_text(f"[\n{rows}\n]\n")


def of_record(record: dict[str, Any]) -> dict[str, Any]:
    """Its platform, the estimate's arguments and parts, and the compiler's figures in bytes."""
    program = (PROGRAMS | MORE)[record["program"]]
    learner = replace(Learner(MODELS[program.model](), **program.how), reduce_dtype=record["reduce_dtype"])
    train = TrainConfig(batch=program.batch, seq_len=program.seq_len)
    cfg = RunConfig("aot", {"model": learner}, mesh=program.mesh, train=train)
    mesh = make_mesh(cfg.mesh, devices(program.devices))
    state = abstract_state(cfg, mesh)
    estimate = memory.estimate(cfg, mesh, state)
    weights = memory.stored(state.learners["model"].params)
    return dict(
        program=program, record=record, platform="tpu" if "h100" not in program.devices else "gpu",
        arguments=estimate.arguments, estimate=estimate.peak, parts=memory.parts(cfg, learner, mesh, weights),
        peak=record["peak"] * GIB, compiled_arguments=record["arguments"] * GIB,
    )  # fmt: skip


def fit(parts_of: list[dict[str, float | int]], beside_state: list[float], peaks: list[float]) -> dict[str, float]:
    """Factors of least squared error relative to the peak, none negative, each pulled towards 1 a little.

    `saved`, the one part whose arrays are known to live at the peak and how large they are, is pulled by more.
    """
    a = np.array([[one[part] for part in memory.PARTS] for one in parts_of]) / np.array(peaks)[:, None]
    b = np.array(beside_state) / np.array(peaks)
    pulls = np.sqrt(np.mean(a**2, axis=0)) * [PULL_SAVED if part == "saved" else PULL for part in memory.PARTS]
    factors, _ = nnls(np.vstack([a, np.diag(pulls)]), np.concatenate([b, pulls]))
    return dict(zip(memory.PARTS, map(float, factors), strict=True))


def split(found: list[dict[str, Any]], platform: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(fitted to, held out)."""
    of_platform = [one for one in found if one["platform"] == platform]
    fitted = sorted({one["record"]["program"] for one in of_platform})[::2]
    parts: tuple[list, list] = [], []
    for one in of_platform:
        parts[one["record"]["program"] not in fitted].append(one)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("add",))
    parser.add_argument("files", nargs="*", metavar="FILE")
    args = parser.parse_args()
    if args.what == "add":
        return add(args.files)
    jax.config.update("jax_platforms", "cpu")
    found = [of_record(record) for record in json.loads(COMPILED.read_text())]
    for platform in ("gpu", "tpu"):
        fitted, _ = split(found, platform)
        beside = [one["peak"] - one["arguments"] for one in fitted]
        factors = fit([one["parts"] for one in fitted], beside, [one["peak"] for one in fitted])
        print(platform, {part: round(factor, 2) for part, factor in factors.items()})
    TABLE.write_text(table(found))
    print(f"written to {TABLE.relative_to(PLANS.parent.parent)}")


def table(found: list[dict[str, Any]]) -> str:
    """The errors of the factors that are in use."""
    lines = [
        "# How far `--fast` is from the compiler", "",
        "GiB a device, of whole steps compiled ahead of time (`tools/compile_steps.py` says what each is, and its",
        "docstring how). Arguments are of shapes alone; on TPUs the compiler pads small shards of them to tiles, which",
        "the estimate leaves out. Held out: not used to fit the factors of `training/memory.py`.", "",
        "| program | reduced in | | arguments | estimated | peak | estimated | error |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    worst: dict[str, float] = {}
    for platform in ("gpu", "tpu"):
        for kind, rows in zip(("fitted", "held out"), split(found, platform), strict=True):
            for one in rows:
                record, error = one["record"], one["estimate"] / one["peak"] - 1
                worst[kind] = max(worst.get(kind, 0.0), abs(error))
                sizes = record["arguments"], one["arguments"] / GIB, record["peak"], one["estimate"] / GIB
                cells = [
                    f"`{record['program']}`",
                    record["reduce_dtype"],
                    kind,
                    *(f"{x:.2f}" for x in sizes),
                    f"{error:+.1%}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    ends = f"Largest error: fitted {worst['fitted']:.1%}, held out {worst['held out']:.1%}."
    lines += ["", f"{ends} `make plan-accuracy` writes this page from the compilers' figures in `compiled.json`."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
