"""A run as it goes, on a page that a browser loads again by itself: how far, how well, on what, where its time goes.

The sections are those of the report (`training/report.py`), beside what only matters while a run is under way.
"""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from training import report, status
from training.page import card, note, page, section, short, table
from training.report_time import spell, time_spent
from training.runs import Entry, Run, entries

STATES = {
    "running": "is under way", "complete": "is complete",
    "stopped": "was stopped, and goes on when it is started again",
    "refused": "ended, and would end again", "silent": "has not been heard of for long",
}  # fmt: skip


def write(folder: str, refresh: int, out: str = "") -> dict[str, Any]:
    """Write the page to `out` (default: board.html in the run's folder); returns `status.read`.

    A page of a run that is complete does not load itself again.
    """
    found = status.read(folder)
    file = epath.Path(out) if out else epath.Path(folder) / "board.html"
    file.write_text(build(found, refresh if found["state"] != "complete" else 0))
    return found


def build(found: Mapping[str, Any], refresh: int = 0) -> str:
    """The page as HTML."""
    now = time.time()
    place = epath.Path(found["folder"])
    name = place.name or str(place)
    if not (place / "metrics.jsonl").exists():
        return page(name, [f"{name} {STATES[found['state']]}. No step is recorded yet."], [_hosts(found, now)], refresh)
    run = Run(place)
    learners = entries([run])
    parts = [_progress(found, run, learners, now), *report.curves(learners), _hosts(found, now), _checkpoints(found),
             *([report.lanes([run])] if run.contents else []), time_spent([run])]  # fmt: skip
    return page(run.name, _summary(found, now), parts, refresh)


def _summary(found: Mapping[str, Any], now: float) -> list[str]:
    last, steps = found["last"], found["steps"]
    of = f" of {steps:,}" if steps else ""
    out = [f"After step {found['step']:,}{of} it {STATES[found['state']]}."]
    if found["refused"]:
        out.append(f"{found['refused'].get('who')}: {found['refused'].get('error')}.")
    if "seconds_per_step" in last and steps and found["state"] == "running":
        out.append(f"About {spell((steps - found['step']) * last['seconds_per_step'])} of steps are left.")
    if "time" in last:
        out.append(f"This page is of {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(now))} UTC, the last record "
                   f"{spell(max(0.0, now - last['time']))} older.")  # fmt: skip
    return out


def _progress(found: Mapping[str, Any], run: Run, learners: list[Entry], now: float) -> str:
    last, steps = found["last"], found["steps"]
    share = 100 * found["step"] / steps if steps else 0
    bar = (f'<div style="height:.6rem;border-radius:4px;background:var(--rule);margin:.2rem 0 .8rem"><div style="'
           f'height:100%;border-radius:4px;background:var(--good);width:{share:.2f}%"></div></div>')  # fmt: skip
    facts = {
        "step": f"{found['step']:,}" + (f" of {steps:,}" if steps else ""),
        "tokens": short(last["tokens_seen"]) if "tokens_seen" in last else "",
        **{f"{e.label}: loss": f"{e.run.last(e.learner, 'loss'):.4f}" for e in learners},
        "tokens a second": f"{last['tokens_per_second']:,.0f}" if "tokens_per_second" in last else "",
        "MFU": f"{last['mfu']:.1%}" if "mfu" in last else "",
        "seconds a step": f"{last['seconds_per_step']:.3g}" if "seconds_per_step" in last else "",
        "waiting for data": f"{last['data_wait']:.1%}" if "data_wait" in last else "",
        "skipped steps": f"{last['skipped_steps']:,}" if "skipped_steps" in last else "",
    }
    rows = [[html.escape(name), html.escape(value)] for name, value in facts.items() if value and value != "nan"]
    return section("Progress", card(bar + table(["", "now"], rows), wide=True))


def _hosts(found: Mapping[str, Any], now: float) -> str:
    starts = found["starts"]
    if not starts:
        return section("Hosts and starts", note("No start of it is recorded."))
    rows = []
    for number, start in enumerate(starts, start=1):
        hosts = start.get("hosts") or []
        named = ", ".join(list(dict.fromkeys(map(str, hosts)))[:8]) + ", ..." * (len(set(hosts)) > 8)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start["time"]))
        rows.append([f"{number}", when, html.escape(str(start.get("how"))), html.escape(str(start.get("job") or "–")),
                     f"{len(hosts)}", html.escape(named)])  # fmt: skip
    body = card(table(["start", "UTC", "by", "job", "processes", "hosts"], rows, text=True), wide=True)
    if (beats := found["heartbeats"]) and found["state"] in status.UNDER_WAY:
        alive = [[html.escape(f"{b.get('process')}"), html.escape(str(b.get("host"))), f"{b.get('step')}",
                  html.escape(str(b.get("what"))), spell(max(0.0, now - b.get("time", now)))]
                 for b in beats]  # fmt: skip
        body += card(table(["process", "host", "step", "doing", "heard of, ago"], alive, text=True), wide=True)
    return section("Hosts and starts", body)


def _checkpoints(found: Mapping[str, Any]) -> str:
    saved = ", ".join(f"{step:,}" for step in found["saved"])
    return section("Checkpoints", note(f"Of steps {saved}." if saved else "None is written yet."))
