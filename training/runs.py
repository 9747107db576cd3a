"""What runs left behind, as a report reads it: their records, configurations, samples; and their learners in order."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from training import status
from training.figures import Line
from training.metrics import FILE, read

SHARED = ("tokens_seen", "tokens_per_second", "seconds_per_step", "data_wait", "tflops", "mfu")
"""Keys of a record that belong to the run, not to one of its learners."""


class Run:
    """A run's records, and its configuration, samples and artifacts where they are there."""

    def __init__(self, folder: str | epath.Path, name: str = ""):
        """ValueError where the folder has no records, naming the nearest that has."""
        self.folder = epath.Path(folder)
        if not (self.folder / FILE).exists():
            raise ValueError(f"no {FILE} in {folder}{_nearest(self.folder)}")
        self.name = name or self.folder.name or str(folder)
        try:
            records = read(self.folder)
        except ValueError as error:
            raise ValueError(f"{self.folder / FILE} is not JSON, one record a line: {error}") from error
        self.records = [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]
        self.config = self._json("config.json", dict) or {}
        self.samples = self._json("samples.json", list)
        self.contents = self._json("data.json", dict)
        self.starts = status.lines(self.folder / status.STARTS)
        self.artifacts = self._json("artifacts.json", list)

    def _json(self, name: str, kind: type) -> Any:
        """What is in a file beside the records, None where it is missing or something else."""
        file = self.folder / name
        try:
            value = json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            return None
        return value if isinstance(value, kind) else None

    @cached_property
    def learners(self) -> dict[str, dict[str, Any]]:
        """Their configurations by name; without a configuration, the names that the records' keys tell."""
        if known := self.config.get("learners"):
            return known
        names = {key.removesuffix("/loss"): {} for r in self.records for key in r if key.endswith("/loss")}
        return names or {"model": {}}

    @property
    def step(self) -> int:
        """The last one with a record."""
        return self.records[-1]["step"] if self.records else 0

    def train(self, field: str) -> Any:
        return self.config.get("train", {}).get(field)

    def key(self, learner: str, key: str) -> str:
        """As in the records: a learner that is alone has no prefix."""
        return f"{learner}/{key}" if len(self.learners) > 1 and key not in SHARED else key

    def series(self, learner: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have the key; NaN for what is no number."""
        name = self.key(learner, key)
        pairs = [(r["step"], _number(r[name])) for r in self.records if name in r]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, float), np.array(values, float)

    def last(self, learner: str, key: str) -> float:
        """The last value, NaN where there is none."""
        values = self.series(learner, key)[1]
        return float(values[-1]) if len(values) else math.nan

    def domains(self, learner: str) -> list[str]:
        start = self.key(learner, "eval/ce/")
        return list(dict.fromkeys(key.removeprefix(start) for r in self.records for key in r if key.startswith(start)))

    def teacher(self, learner: str) -> str:
        return (self.learners[learner].get("distillation") or {}).get("teacher") or ""

    def role(self, learner: str) -> str:
        cfg, teacher = self.learners[learner], self.teacher(learner)
        if "optimizer" in cfg and cfg["optimizer"] is None:
            return "frozen teacher"
        teaches = any(self.teacher(other) == learner for other in self.learners)
        roles = [f"student of {teacher}"] * bool(teacher) + ["teacher"] * teaches
        return ", ".join(roles) or "on labels alone"


class Entry(NamedTuple):
    """One learner of one run, with the place in the order of all that gives it its colour."""

    run: Run
    learner: str
    label: str
    index: int

    def line(self, key: str) -> Line:
        return Line(self.label, self.index, *self.run.series(self.learner, key))


def load(folders: Sequence[str]) -> list[Run]:
    """Runs named by their folders, by whole paths where two folders have the same name."""
    names = [Path(folder).name for folder in folders]
    return [Run(f, n if names.count(n) == 1 else str(f)) for f, n in zip(folders, names, strict=True)]


def entries(runs: Sequence[Run]) -> list[Entry]:
    found = [(run, learner) for run in runs for learner in run.learners]
    labels = [learner if len(runs) == 1 else f"{run.name} · {learner}" for run, learner in found]
    return [Entry(run, learner, labels[i], i) for i, (run, learner) in enumerate(found)]


def _nearest(folder: epath.Path) -> str:
    """The run folder within, beside, or above what was named whose path is most alike."""
    around = [folder, folder.parent, *folder.parents[:2], epath.Path("runs")]
    near: dict[str, None] = {}
    for place in around:
        if place.is_dir():
            near |= {str(f): None for f in (place, *sorted(place.iterdir())) if (f / FILE).exists()}
    best = difflib.get_close_matches(str(folder), near, n=1, cutoff=0)
    return f"; the nearest run is {best[0]}" if best else "; `llama4 train` makes such a folder"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
