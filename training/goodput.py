"""What becomes of a run's time: steps, and all else (goodput and badput).

A process counts the seconds that it spends on what is no step: compiling, saving, restoring, evaluating. They go into
every record, and with the times of records and of starts they tell where the hours of a whole run went, restarts and
work that was lost by them included. Goodput is the share in which steps were made that the run still has.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

SPENT = {"compile": 0.0, "save": 0.0, "restore": 0.0, "evaluate": 0.0}
"""Seconds of this start so far; the saving that goes on beside steps is not counted."""
PREFIX = "seconds/"
KINDS: tuple[str, ...] = ("steps", "data", "start", "compile", "restore", "evaluate", "save", "other", "restart")
"""steps: those that the run has, without the wait for their data; start: until the first step, without what follows;
other: what nobody counts, logging for one; restart: from the last record of a start to the next start, in which the
run stood still or did what it then did again."""
WORDS = {
    "steps": "steps", "data": "waiting for data", "start": "start-up", "compile": "compiling", "restore": "restoring",
    "evaluate": "evaluating", "save": "saving", "other": "other", "restart": "restarts and lost steps",
}  # fmt: skip
_listening: list[bool] = []


def begin() -> None:
    """A start of a run: what this process spent on an earlier run, as in `llama4 demo`, is none of its."""
    SPENT.update(dict.fromkeys(SPENT, 0.0))
    _listen()


@contextmanager
def spent(what: str) -> Iterator[None]:
    """Count the seconds of a block, or of a function that this decorates; what is compiled in it is compiling."""
    _listen()
    began, compiled = time.perf_counter(), SPENT["compile"]
    try:
        yield
    finally:
        SPENT[what] += max(0.0, time.perf_counter() - began - (SPENT["compile"] - compiled))


def counted() -> dict[str, float]:
    """For a record: this start's seconds so far, by what they were spent on."""
    _listen()
    return {PREFIX + what: round(seconds, 3) for what, seconds in SPENT.items()}


def _listen() -> None:
    if not _listening:
        _listening.append(True)
        jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **kwargs: Any) -> None:
    if event.startswith("/jax/core/compile/"):  # tracing, lowering, the compiler
        SPENT["compile"] += duration_secs


def account(records: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a run by `KINDS`; empty where its records do not tell.

    `records` are those it still has: a start goes on from a checkpoint and drops what came after it.
    """
    timed = [r for r in records if isinstance(r.get("time"), int | float) and PREFIX + "compile" in r]
    if not timed or not starts:
        return {}
    out = dict.fromkeys(KINDS, 0.0)
    edges = [float(start["time"]) for start in starts] + [float("inf")]
    before = {"step": 0}
    last = edges[0]
    for begin, end in itertools.pairwise(edges):
        mine = [r for r in timed if begin <= r["time"] < end]
        out["restart"] += begin - last  # since the last that is left of before
        last = begin
        if not mine:
            continue
        segment = dict.fromkeys(KINDS, 0.0)
        for i, record in enumerate(mine):
            seconds = (record["step"] - before["step"]) * record.get("seconds_per_step", 0.0)
            segment["data"] += seconds * record.get("data_wait", 0.0)
            segment["steps"] += seconds * (1 - record.get("data_wait", 0.0))
            if i == 0:
                early = sum(record.get(PREFIX + what, 0.0) for what in SPENT)
                segment["start"] = max(0.0, record["time"] - begin - seconds - early)
            before = record
        for what in SPENT:
            segment[what] = mine[-1].get(PREFIX + what, 0.0)
        last = mine[-1]["time"]
        segment["other"] = max(0.0, last - begin - sum(segment.values()))
        out = {kind: out[kind] + segment[kind] for kind in KINDS}
    return out


def goodput(seconds: Mapping[str, float]) -> float | None:
    """The share of the time that went into steps."""
    total = sum(seconds.values())
    return seconds["steps"] / total if total > 0 else None
