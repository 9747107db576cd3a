"""Bad steps: what a run makes of losses that are not finite or jump, and which documents they were of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from data.batch import Batch
from training.config import SafetyConfig

WINDOW, ENOUGH = 64, 16
"""Losses that a jump is judged by, and how many there have to be."""
DEVIATION, LEAST = 1.4826, 0.02
"""Median absolute deviations in a standard one, of a normal distribution; and the least that counts as one, a share."""


class BadStep(Exception):
    """The run has to go back from `step`; it may go on with the data behind it, at `place`."""

    def __init__(self, step: int, why: str, place: Mapping[str, Any], oldest: int):
        super().__init__(f"step {step}: {why}")
        self.step, self.why, self.place = step, why, place
        self.oldest = oldest
        """Steps after which the weights are surely good: a checkpoint of a later one may hold what went wrong."""


class Guard:
    """Judges one step after the other. Its state follows from their losses alone, so that a run that was interrupted
    judges as one that was not."""

    def __init__(self, cfg: SafetyConfig, state: Mapping[str, Any] | None = None):
        self.cfg = cfg
        state = state or {}
        self.losses: dict[str, list[float]] = {name: list(of) for name, of in state.get("losses", {}).items()}
        self.skipped: int = state.get("skipped", 0)  # steps that left a learner as it was, of the whole run
        self.in_a_row: int = state.get("in_a_row", 0)
        self.rollbacks: int = state.get("rollbacks", 0)

    def state(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        return dict(losses=self.losses, skipped=self.skipped, in_a_row=self.in_a_row, rollbacks=self.rollbacks)

    def forget(self) -> None:
        """Other rows follow, whose losses are not to be compared with those before."""
        self.losses = {}

    def judge(self, losses: Mapping[str, float], good: Mapping[str, bool]) -> str | None:
        """Why the run has to go back from a step with these losses by learner, None where it need not."""
        if bad := [name for name, fine in good.items() if not fine]:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row < self.cfg.bad_steps:
                return None
            return f"{', '.join(bad)}: loss or gradient not finite, {self.in_a_row} steps in a row"
        self.in_a_row = 0
        for name, loss in losses.items():
            if (most := self.threshold(name)) is not None and loss > most:
                before = float(np.median(self.losses[name]))
                return f"{name}: loss {loss:.4g}, above {most:.4g}; the median before it was {before:.4g}"
        for name, loss in losses.items():
            self.losses[name] = [*self.losses.get(name, []), loss][-WINDOW:]
        return None

    def threshold(self, name: str) -> float | None:
        """median + spike max(1.4826 MAD, 2% of the median) of the learner's last losses; None while there are few."""
        recent = np.asarray(self.losses.get(name, []))
        if not self.cfg.spike or len(recent) < ENOUGH:
            return None
        median = np.median(recent)
        deviation = DEVIATION * np.median(np.abs(recent - median))
        return float(median + self.cfg.spike * max(deviation, LEAST * abs(median)))


def documents(batch: Batch, domains: tuple[str, ...]) -> dict[str, list[int]]:
    """The documents in this process's rows: their indices, by domain."""
    valid = np.asarray(batch.segment_ids) > 0
    pairs = np.unique(np.stack([np.asarray(batch.domain)[valid], np.asarray(batch.document_id)[valid]]), axis=1)
    return {name: pairs[1, pairs[0] == d].tolist() for d, name in enumerate(domains) if (pairs[0] == d).any()}


def note(folder: epath.Path, step: int, event: Mapping[str, Any]) -> epath.Path:
    """Keep what is known of a bad step in the run's folder, a file for each process; returns it."""
    file = folder / "bad_steps" / f"{step}.{jax.process_index()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"step": step, **event}, indent=1) + "\n")
    return file
