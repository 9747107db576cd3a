"""How far a run is and whether it goes on, read from its folder by whoever sees it. Imports nothing heavy."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from training import manifest

REFUSED = "refused.json"
"""What a process leaves that ended for a reason which would end it again: wrong input, a loss that is not finite."""
STARTS = "starts.jsonl"
"""A line for every start of the run: when, on which hosts, started by what."""
STOPPED = "requeue.json"
"""What a run leaves that was told to stop: whoever reads it may start the run again."""
UNDER_WAY = ("running", "silent")
"""States of a run whose page and heartbeats still change, or may."""
METRICS = "metrics.jsonl"
"""The run's records, a line for each."""
HEARTBEATS = "heartbeats"
"""The folder in which every process says now and then what it does (`training/watchdog.py`)."""
SKEW = 30.0
"""Seconds that clocks of hosts may differ."""
SILENT = 600.0
"""Seconds without a record after which a run is not believed to go on, or ten of its steps."""


def refuse(folder: str, who: str, error: Exception) -> None:
    """Leave word that this start failed for good; nothing where the folder cannot be written."""
    told = dict(who=who, error=" ".join(str(error).split()), time=round(time.time(), 3))
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        (epath.Path(folder) / REFUSED).write_text(json.dumps(told) + "\n")
    except OSError:
        pass


def begin(folder: str, facts: Mapping[str, Any]) -> None:
    """A start of the run; by the first process alone."""
    place = epath.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / REFUSED).unlink(missing_ok=True)
    before = (place / STARTS).read_text() if (place / STARTS).exists() else ""
    (place / STARTS).write_text(before + json.dumps({"time": round(time.time(), 3), **facts}) + "\n")


def read(folder: str | epath.Path) -> dict[str, Any]:
    """Facts about the run as plain data; FileNotFoundError where there is none."""
    place = epath.Path(folder)
    if not (place / "config.json").exists() and not (place / STARTS).exists() and not (place / REFUSED).exists():
        raise FileNotFoundError(f"no run in {folder}: it has neither a config.json nor a {STARTS}")
    told = records(place)
    config, starts = _json(place / "config.json"), lines(place / STARTS)
    last = told[-1] if told else {}
    saved = manifest.finished(place / "checkpoints")
    steps = (config.get("train") or {}).get("steps")
    found = dict(folder=str(folder), name=config.get("name"), step=last.get("step", 0), steps=steps, saved=saved,
                 last=last, starts=starts, refused=_json(place / REFUSED) or None,
                 stopped=_json(place / STOPPED) or None,
                 heartbeats=heartbeats(place))  # fmt: skip
    return found | dict(state=state(found))


def state(found: Mapping[str, Any], now: float | None = None) -> str:
    """complete, refused, stopped, running or silent: what the newest of a run's traces says."""
    now = time.time() if now is None else now
    began = found["starts"][-1]["time"] if found["starts"] else 0.0
    stopped = bool(found["stopped"]) and found["stopped"].get("time", 0) >= began
    saved = bool(found["steps"] and found["saved"]) and found["saved"][-1] >= found["steps"]
    owed = stopped and saved and found["step"] < found["steps"]  # the evaluation that it was stopped in
    if saved and not owed:
        return "complete"
    if found["refused"]:
        return "refused"
    if stopped:
        return "stopped"
    heard = max([began, found["last"].get("time", 0), *(beat.get("time", 0) for beat in found["heartbeats"])])
    return "running" if now - heard < max(SILENT, 10 * found["last"].get("seconds_per_step", 0)) else "silent"


def restart(found: Mapping[str, Any], since: float = 0.0, most: int | None = None, job: str | None = None
            ) -> tuple[bool, str]:  # fmt: skip
    """Whether a job that ended should be started again, and why.

    What was refused before `since`, the time of the start that ended, is that of another start. Of one that is counted
    nowhere else, `most` allows so many more than the first of `job`, each of which has to have begun.
    """
    refused = found["refused"]
    if refused and refused.get("time", since) < since - SKEW:
        found = {**found, "refused": None}
        found["state"] = state(found)
    if found["state"] == "complete":
        return False, "it is complete"
    if found["refused"]:
        return False, f"it would fail again: {found['refused'].get('error')}"
    if most is not None:
        times = [start["time"] for start in found["starts"] if start.get("job") == job]
        if not times or times[-1] < since - SKEW:
            return False, "this start did not begin: its log says why"
        if len(times) > most:
            return False, f"it was started {len(times)} time{'s' * (len(times) > 1)}"
    if found["state"] == "stopped":
        return True, f"it was stopped by {found['stopped'].get('signal', 'a signal')}"
    return True, "a process died"


def _json(file: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def records(folder: epath.Path) -> list[dict[str, Any]]:
    """A run's records, in order; what is none, as a line that was cut off, is left out."""
    return [one for one in lines(folder / METRICS) if type(one.get("step")) is int]


def lines(file: epath.Path) -> list[dict[str, Any]]:
    """Lines of JSON objects; what is none, as a line that was cut off, is left out."""
    found = []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def heartbeats(place: epath.Path) -> list[dict[str, Any]]:
    """The newest of every process of a run; one that is being written is left out."""
    folder = place / HEARTBEATS
    return [beat for file in sorted(folder.glob("*.json")) if (beat := _json(file))] if folder.exists() else []
