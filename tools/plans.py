"""The committed plans: docs/plans/NAME.json for every preset of full size, and the table README.md beside them.

    python -m tools.plans               # all, each compiled in a process of its own (minutes each, see below)
    python -m tools.plans NAME ...      # some of them; the table keeps the others as they are

Needs the extras tpu and cuda, and tokamax (README). A plan whose compiler is not installed, or takes too long, is made
by formula, and the table says so; one that was compiled before stays, so that each compiler may have its own venv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.ahead import check_compiler

PLANS = Path(__file__).resolve().parent.parent / "docs" / "plans"
GIB = 2**30
TOPOLOGIES = {
    "pretrain:scout_8k": "v5p:4x4x8",
    "pretrain:scout_256k": "v5p:4x8x8",
    "pretrain:scout_images_256k": "v5p:4x8x8",
    "pretrain:maverick_8k": "v5p:8x8x8",
    "pretrain:maverick_256k": "v5p:8x8x8",
    "pretrain:behemoth_8k": "v5p:8x16x16",
    "codistill:maverick_scout_from_behemoth": "v5p:16x16x16",
    "distill:scout_from_maverick": "h100:32x8",
}


def file_of(name: str) -> Path:
    return PLANS / f"{name.replace(':', '-')}.json"


def make(name: str, fast: bool, minutes: float) -> None:
    """One plan, compiled where it can be in so many minutes; what was compiled elsewhere is kept where it cannot."""
    command = [sys.executable, "-m", "launch.cli", "plan", name, "--topology", TOPOLOGIES[name]]
    command += ["--json", str(file_of(name))]
    print(f"{name} on {TOPOLOGIES[name]}", flush=True)
    if not fast:
        try:
            check_compiler(TOPOLOGIES[name])
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60 * minutes)
            return
        except (ValueError, subprocess.TimeoutExpired) as error:
            print(f"  {error}", flush=True)
            if file_of(name).exists() and "compiled" in json.loads(file_of(name).read_text()):
                print("  its file stays as it was compiled before", flush=True)
                return
    subprocess.run([*command, "--fast"], check=True, stdout=subprocess.DEVNULL)


def table() -> str:
    """What the plans on disk say."""
    lines = [
        "# Plans of the presets of full size",
        "",
        "`make plans` writes this page and the JSON files beside it. Nothing of it ran: memory is the compiler's peak",
        "of the whole step where it was compiled, else by formula ([how far off](accuracy.md)); times are the least",
        "that the data sheets allow, everything overlapping at peak rates.",
        "",
        "| preset | on | memory, GiB of a device | fits | bound by | s a step, at least | MFU, at most | tokens | "
        "days, at least | chip-hours, at least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in TOPOLOGIES:
        plan = json.loads(file_of(name).read_text())
        lines.append(f"| {' | '.join(_cells(name, plan))} |")
    lines += ["", "| preset | mesh | how | what would lower the memory most |", "|---|---|---|---|"]
    for name in TOPOLOGIES:
        plan = json.loads(file_of(name).read_text())
        axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        how = "; ".join(f"{learner}: {_how(one)}" for learner, one in plan["learners"].items())
        better = plan["memory"].get("next")
        lower = f"`{better['option']}` (estimated {better['peak'] / GIB:.0f})" if better else ""
        lines.append(f"| `{name}` | {axes} | {how} | {lower} |")
    return "\n".join(lines) + "\n"


def _cells(name: str, plan: dict[str, Any]) -> list[str]:
    memory, roof, run = plan["memory"], plan["roofline"], plan["run"]
    how = f"compiled in {plan['compiled']['compile']:.0f} s" if "compiled" in plan else "by formula"
    return [
        f"[`{name}`]({file_of(name).name})", f"{plan['topology']} ({plan['devices']})",
        f"{memory['peak'] / GIB:.1f} of {memory['hbm'] / GIB:.1f}, {how}", "yes" if memory["fits"] else "**no**",
        roof["bound"], f"{roof['step']:.3g}", f"{roof['mfu']:.0%}", f"{run['tokens'] / 1e12:.3g}T",
        f"{run['days']:,.0f}", f"{run['chip_hours'] / 1e6:.2f}M",
    ]  # fmt: skip


def _how(learner: dict[str, Any]) -> str:
    words = [f"remat {learner['remat']}"] if learner["trains"] else ["frozen"]
    words += [f"{learner['microbatches']} microbatches"] if learner["microbatches"] > 1 else []
    return ", ".join([*words, learner["dispatch"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TOPOLOGIES))
    parser.add_argument("--fast", action="store_true", help="by formula, nothing compiled")
    parser.add_argument("--minutes", type=float, default=30, help="to compile one, before it is made by formula")
    args = parser.parse_args()
    if unknown := set(args.names) - set(TOPOLOGIES):
        parser.error(f"no plan {', '.join(unknown)}: there are {', '.join(TOPOLOGIES)}")
    for name in args.names or TOPOLOGIES:
        make(name, args.fast, args.minutes)
    (PLANS / "README.md").write_text(table())


if __name__ == "__main__":
    main()
