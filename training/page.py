"""The page that a report is written on: its typography, and the few elements it is made of.

`title`, captions and sentences are escaped here; bodies and table cells are HTML already.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from training.redact import redact

STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #fff; --ink: #22221f; --soft: #66665f; --rule: #e2e2dc;
  --good: #00664b; --bad: #a34700; }
@media (prefers-color-scheme: dark) { :root { --paper: #191918; --card: #232322; --ink: #e8e8e3; --soft: #a3a39b;
  --rule: #3a3a37; --good: #4cc9a0; --bad: #f0995a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: clamp(20px, 5vw, 56px) clamp(12px, 4vw, 40px); }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .6rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; letter-spacing: -.005em; margin: 2.6rem 0 .5rem; }
.summary { font-size: 1.06rem; max-width: 46em; margin: 0; }
.note { color: var(--soft); max-width: 46em; margin: 0; grid-column: 1 / -1; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 16px;
  align-items: start; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; margin: 0;
  min-width: 0; }
.wide { grid-column: 1 / -1; overflow-x: auto; }
figure.card { background: #fff; color: #22221f; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .86rem; color: #66665f; padding: 0 2px 8px; }
table { border-collapse: collapse; font-size: .92rem; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; font-size: .84rem; }
th:first-child { text-align: left; padding-left: 4px; }
.text td, .text thead th { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
tbody tr:last-child > * { border-bottom: 0; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.better { color: var(--good); } .worse { color: var(--bad); } .same { color: var(--soft); }
.who { font-size: .86rem; color: var(--soft); margin: 0 0 4px; }
.edge { color: var(--good); font-size: .8em; border: 1px solid; border-radius: 4px; padding: 0 4px; }
.read { opacity: .5; }
.seen { height: 3.4em; margin: 2px .3em; vertical-align: middle; border-radius: 4px; image-rendering: pixelated; }
.sample { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@page { margin: 14mm; }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --rule: #ddd; --good: #00664b;
  --bad: #a34700; } main { padding: 0; max-width: none; } h2 { break-after: avoid; margin-top: 1.6rem; }
  .note { break-after: avoid; } .grid { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { break-inside: avoid; } .wide { overflow: visible; } table { font-size: .8rem; }
  th, td { padding: 4px 7px; white-space: normal; } section { break-inside: avoid; } * { print-color-adjust: exact; } }
"""


def page(title: str, summary: Sequence[str], sections: Sequence[str], refresh: int = 0) -> str:
    """A whole document: title, summary in sentences, sections. In the summary numbers with three decimals stand out.
    Secrets do not (`training/redact.py`).

    A browser that shows it loads it again every `refresh` seconds, if that is not 0.
    """
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    told = re.sub(r"\b\d+\.\d{3}\b", r"<strong>\g<0></strong>", html.escape(" ".join(summary)))
    whole = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="summary">{told}</p>
{"".join(sections)}</main>
</body>
</html>
"""
    return redact(whole)


def section(title: str, body: str) -> str:
    return f'<section>\n<h2>{html.escape(title)}</h2>\n<div class="grid">\n{body}</div>\n</section>\n'


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>\n'


def card(body: str, wide: bool = False) -> str:
    """A box; a wide one takes the whole row and scrolls what is wider than the page."""
    return f'<div class="card wide" tabindex="0">{body}</div>\n' if wide else f'<div class="card">{body}</div>\n'


def figure_card(svg: str, caption: str) -> str:
    return f'<figure class="card"><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>\n'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """Cells are HTML; the first of a row is its heading. `text`: cells hold words, which may wrap, not numbers."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    kind = ' class="text"' if text else ""
    return f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def short(n: int | float) -> str:
    """A count in a few characters: 1.23M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
