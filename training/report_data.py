"""The section of a report about what was read: the mixture, lengths, packing, and some documents as they lay in rows.

Every text and name comes from the data: `printable`, then escaped.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from data.contents import printable
from training import figures
from training.page import card, figure_card, note, section
from training.runs import Run

MIXTURE = "Share of the tokens by domain: what the mixture aims at, and what was read."
LENGTHS = "Documents, or pieces of those longer than a row, by their tokens; a bar holds those up to its number."


def data(runs: Sequence[Run]) -> str:
    """The section, which says of which runs nothing is known; runs that read the same share a part."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps(run.contents, sort_keys=True), []).append(run)
    body, missing = "", []
    for group in alike.values():
        names = [run.name for run in group]
        try:
            body += _of_run(group[0].contents, f"{', '.join(names)}: " if len(runs) > 1 else "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # missing, or not as we write it
            missing += names
    if missing:
        body += note(f"What the batches held was not kept: {', '.join(missing)}.")
    return section("Data", body)


def _of_run(facts: dict[str, Any], start: str) -> str:
    first, last = facts["step"], facts["step"] + facts["batches"] - 1
    steps = f"step {first:,}" if last == first else f"steps {first:,} to {last:,}"
    lead = note(
        f"{start}The batches of {steps}: {facts['rows']:,} rows, {facts['fill']:.1%} full, {facts['pieces_per_row']:g} "
        f"documents or pieces of documents a row; {facts['tokens']:,} tokens, of which the loss counts "
        f"{facts['counted']:,}. Below, text that is read but not predicted for the loss is faint."
    )
    mixture = {printable(name): [d["target"], d["read"]] for name, d in facts["mixture"].items()}
    charts = figure_card(figures.dots(mixture, ["target", "read"], [6, 0], "share of the tokens"), MIXTURE)
    bars = {f"{bound:,}": count for bound, count in facts["lengths"]}
    charts += figure_card(figures.bars(bars, "tokens", "documents or pieces"), LENGTHS)
    return lead + charts + "".join(map(_sample, facts["samples"]))


def _sample(sample: dict[str, Any]) -> str:
    goes_on = [" · goes on from before"] * (not sample["begins"]) + [" · goes on after"] * (not sample["ends"])
    who = (
        f"row {sample['row']}, place {sample['at']:,} · "
        f"{printable(sample['domain'])} {sample['document']} · {sample['tokens']:,} tokens{''.join(goes_on)}"
    )
    text = '<span class="edge">bos</span> ' * sample["begins"]
    for span, counted, *picture in sample["spans"]:
        if picture and picture[0] and re.fullmatch(r"[A-Za-z0-9+/]+=*", picture[0]):
            text += f'<img class="seen" alt="image" src="data:image/png;base64,{picture[0]}">'
            continue
        words = html.escape(printable(span))
        text += words if counted else f'<span class="read">{words}</span>'
    text += " …" if sample["cut"] else ' <span class="edge">eos</span>' * sample["ends"]
    return card(f'<p class="who">{html.escape(who)}</p><p class="sample">{text}</p>')
