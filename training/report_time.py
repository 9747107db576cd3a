"""The section of a report about where a run's time went, and a bar of it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from training.figures import COLORS
from training.goodput import WORDS, account, goodput
from training.page import card, note, section, table
from training.runs import Run

LEAD = (
    "Goodput is the share of the time since the first start in which steps were made that the run still has. "
    "Restarts are from the last record that is left of a start to the next start."
)


def time_spent(runs: Sequence[Run]) -> str:
    """The section, which says of which runs nothing is known."""
    known = {run.name: seconds for run in runs if (seconds := account(run.records, run.starts))}
    missing = [run.name for run in runs if run.name not in known]
    body = note(LEAD) if known else ""
    for name, seconds in known.items():
        share = goodput(seconds) or 0.0
        label = f"{html.escape(name)}: " if len(runs) > 1 else ""
        rows = [[f"{_swatch(i)}{word}", spell(seconds[kind]), f"{seconds[kind] / sum(seconds.values()):.1%}"]
                for i, (kind, word) in enumerate(WORDS.items())]  # fmt: skip
        body += card(f'<p class="who">{label}goodput {share:.1%}</p>{bar(seconds)}{table(["", "time", "share"], rows)}')
    if missing:
        body += note(f"Where the time went was not kept: {', '.join(missing)}.")
    return section("Time", body)


def bar(seconds: Mapping[str, float]) -> str:
    """One bar of all kinds."""
    total = sum(seconds.values()) or 1.0
    parts = "".join(
        f'<span title="{WORDS[kind]}" style="display:inline-block;height:100%;width:{100 * value / total:.3f}%;'
        f'background:{_color(i)}"></span>'
        for i, (kind, value) in enumerate(seconds.items())
    )
    return f'<div style="height:1.1rem;border-radius:4px;overflow:hidden;margin:0 0 .6rem;font-size:0">{parts}</div>'


def spell(seconds: float) -> str:
    """A duration in two units at most."""
    for name, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // part)} {below}"
    return f"{seconds:.1f} s"


def _swatch(i: int) -> str:
    return f'<span class="swatch" style="background:{_color(i)}"></span>'


def _color(i: int) -> str:
    return (*COLORS, "#c9c9c2", "#8a3324")[i % (len(COLORS) + 2)]
