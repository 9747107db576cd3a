"""What is made of a step's metrics once they are there: judged, counted, written, shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data.batch import Batch
from training import guard
from training.config import RunConfig
from training.evaluate import BrokenOff
from training.metrics import Console, Throughput, Writers, prefix, scalars
from training.target_sources import TargetSource


class Kept(NamedTuple):
    """What a checkpoint keeps of the reports, as JSON."""

    tokens_seen: int = 0
    """Valid ones, of all steps that are finished."""
    domain_tokens: dict[str, int] | None = None
    """The same by domain."""
    guard: dict[str, Any] | None = None
    """Of `Guard.state`."""
    owed: dict[str, Any] | None = None
    """The record of the checkpoint's step, if its evaluation was broken off: to be made up for, and written then."""


class Pending(NamedTuple):
    """A step that was dispatched."""

    step: int
    metrics: Any  # on the devices
    wait: float  # seconds, for its batch
    rows: Batch  # of this process, on the host
    place: dict[str, Any]  # in the data, behind its batch


class Reporter:
    """Holds a step's metrics on the devices until the next step is under way, then fetches, judges and writes them."""

    def __init__(
        self, cfg: RunConfig, mesh: Mesh, domains: tuple[str, ...], targets: Mapping[str, TargetSource], last: int,
        kept: Kept, pass_tokens: Mapping[str, float], folder: epath.Path, console: Console, writers: Writers | None,
    ):  # fmt: skip
        """Of the steps up to `last` of a stage, whose run without stages is `cfg`; `pass_tokens`: those that the
        loss counts in one pass over each domain."""
        self.cfg, self.domains, self.targets, self.folder = cfg, domains, targets, folder
        self.console, self.writers = console, writers
        self.tokens_seen, self.owed = kept.tokens_seen, kept.owed
        self.domain_tokens, self.pass_tokens = dict(kept.domain_tokens or {}), pass_tokens
        self.guard = guard.Guard(cfg.safety, kept.guard)
        self._last = last
        self._throughput = Throughput(cfg, mesh)
        self._pending: Pending | None = None
        self._compiled = False

    def kept(self) -> dict[str, Any]:
        """For the checkpoint; see `Kept`."""
        return Kept(self.tokens_seen, self.domain_tokens, self.guard.state(), self.owed)._asdict()

    def begin(self, pending: Pending) -> None:
        """A step was dispatched."""
        self._pending = pending

    def finish(self, held_out: Callable[[], dict[str, float]] | None = None) -> None:
        """Wait for the step begun last, if any; where it is due or `held_out` gives an evaluation, write its record.

        `BadStep` where the run has to go back from it. An evaluation that is broken off leaves its record `owed`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step, values = pending.step, jax.device_get(pending.metrics)
        sums = next(iter(values.values()))["sums"]  # learners see the same tokens
        tokens = int(sums.tokens)
        self.tokens_seen += tokens
        for name, count in zip(self.domains, np.asarray(sums.domain_tokens).tolist(), strict=True):
            self.domain_tokens[name] = self.domain_tokens.get(name, 0) + round(count)
        if self._compiled:
            self._throughput.add(float(tokens), pending.wait)
        else:  # the first step's time was the compiler's
            self._throughput.restart()
            self._compiled = True
        self._judge(pending, values)
        self.console.advance(step)
        due = step == 1 or step == self._last or step % self.cfg.train.log_every == 0
        if not (due or held_out):
            return
        record = {**scalars(values, self.cfg, self.domains), **self._ages(step), **self._seen(),
                  **self._throughput.report()}  # fmt: skip
        if self.guard.skipped:
            record["skipped_steps"] = self.guard.skipped
        self.owed = record
        self.settle(step, held_out, always=due)

    def settle(self, step: int, held_out: Callable[[], dict[str, float]] | None, always: bool = True) -> None:
        """Write the record that is owed, with an evaluation; `always`, also where that is empty."""
        if self.owed is None:
            return
        try:
            evaluation = held_out() if held_out else {}
        except BrokenOff:
            return
        record, self.owed = {**self.owed, **evaluation}, None
        if self.writers and (always or evaluation):
            self.writers.write(step, record)
            self.console.report(step, record)
        if self.writers and held_out:  # a checkpoint may follow: the file must have what came before it
            self.writers.flush()

    def _judge(self, pending: Pending, values: Mapping[str, Any]) -> None:
        """Skipped steps and those to go back from are spoken of, with their documents in a file; the latter raise."""
        good = {name: bool(of["ok"]) for name, of in values.items()}
        losses = {name: _cross_entropy(of["sums"]) for name, of in values.items()}
        oldest = pending.step - (2 if all(good.values()) else 1)  # what was skipped has changed nothing
        why = self.guard.judge(losses, good)
        if why is None and all(good.values()):
            return
        of = guard.documents(pending.rows, self.domains)
        norms = {name: float(of["grad_norm"]) for name, of in values.items()}
        event = dict(why=why or "not finite", losses=losses, grad_norms=norms, documents=of, place=pending.place)
        file = guard.note(self.folder, pending.step, event)
        bad = ", ".join(name for name, fine in good.items() if not fine)
        what = why or f"{bad}: loss or gradient not finite; left as it was"
        listed = "; ".join(
            f"{d} {', '.join(map(str, ids[:8]))}{' ...' if len(ids) > 8 else ''}" for d, ids in of.items()
        )
        self.console.line(f"step {pending.step}: {what}; documents {listed} (all of them in {file})")
        if why is not None:
            raise guard.BadStep(pending.step, why, pending.place, oldest)

    def _seen(self) -> dict[str, int | float]:
        """Labels trained on so far in the run, in all and by domain, and the passes over each domain that those make
        (by the tokens that one has, which are estimated; `llama4 data ledger` counts documents)."""
        out: dict[str, int | float] = {"tokens_seen": self.tokens_seen}
        for name in self.domains:
            seen = self.domain_tokens.get(name, 0)
            out |= {f"tokens_seen/{name}": seen, f"epoch/{name}": round(seen / self.pass_tokens[name], 4)}
        return out

    def _ages(self, step: int) -> dict[str, int]:
        """teacher_step: steps that a student's teacher had made when it made these targets, where that is known; and
        staleness, how many it has made since, of one that trains in this run."""
        out = {}
        for name, learner in self.cfg.learners.items():
            teacher, start = learner.distillation.teacher, prefix(name, self.cfg)
            if teacher in self.targets:
                out[f"{start}teacher_step"] = self.targets[teacher].identity.teacher_step
            elif teacher and self.cfg.learners[teacher].optimizer:
                out |= {f"{start}teacher_step": step - 1, f"{start}staleness": 0}
        return out

    def restart(self) -> None:
        """Leave out of the throughput what was done since the last step."""
        self._throughput.restart()


def _cross_entropy(sums: Any) -> float:
    return float(np.sum(sums.by_domain["ce"], dtype=np.float64) / max(float(sums.tokens), 1.0))
