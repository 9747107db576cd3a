"""Other programs' pages of runs, beside TensorBoard: trackio, Weights & Biases, MLflow, each imported when asked for.

They get the same scalars as TensorBoard, from the first process. A run does not depend on them: what cannot be asked
for at all is refused before it begins, and one that does not start, fails, hangs or is slow costs it a line in the log.
"""

from __future__ import annotations

import importlib
import queue
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from training.redact import redact

KINDS = ("trackio", "wandb", "mlflow")
"""Also the names of the extras that bring them."""
BEHIND = 1000
"""Records that may wait for a tracker; more are left out."""
LAST = 60.0
"""Seconds that a tracker has for what is still to be told when the run ends."""


class Tracker:
    """A run in a tracker, to which a thread of its own talks."""

    def __init__(self, kind: str, begin: Callable[[], tuple[Any, Any]], say: Callable[[str], object]):
        """`begin` gives (what takes a step and its scalars, what ends the run there)."""
        self._kind, self._say = kind, say
        self._records: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._spoken = False
        self._thread = threading.Thread(target=self._work, args=(begin,), daemon=True, name=kind)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """A step's scalars; returns at once."""
        if not self._thread.is_alive():
            return
        if self._records.qsize() < BEHIND:
            self._records.put((step, dict(scalars)))
        else:
            self._speak(f"is {BEHIND:,} records behind, and gets no more of them until it has caught up")

    def finish(self) -> None:
        """Wait until all is told, for `LAST` seconds at most."""
        self._records.put(None)
        self._thread.join(LAST)
        if self._thread.is_alive():
            self._say(f"{self._kind} did not take what it was told within {LAST:.0f} s; it may lack the last records")

    def _work(self, begin: Callable[[], tuple[Any, Any]]) -> None:
        try:
            log, finish = begin()
        except BaseException as error:  # some end the program
            return self._speak("did not start, and the run goes on without it", error)
        while (record := self._records.get()) is not None:
            self._guarded(log, *record)
        self._guarded(finish)

    def _guarded(self, call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:
            self._speak("failed, and the run goes on", error)

    def _speak(self, what: str, error: BaseException | None = None) -> None:
        """Of what is wrong with it, once."""
        if not self._spoken:
            why = "" if error is None else f": {' '.join(str(error).split()) or type(error).__name__}"
            self._say(f"{self._kind} {what}{redact(why)}")
        self._spoken = True


def start(asked: str, run: str, config: Mapping[str, Any], say: Callable[[str], object] = print) -> Tracker:
    """`asked` is KIND or KIND:PROJECT; ValueError for another kind, ImportError, naming the extra, where it is missing.

    A run that goes on goes on under its name where the tracker knows of such.
    """
    kind, _, project = asked.partition(":")
    if kind not in KINDS:
        raise ValueError(f"--track takes {', '.join(KINDS)}, with :PROJECT or without, not {asked!r}")
    try:
        module = importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        raise ImportError(f"{kind} is not installed: pip install -e '.[{kind}]'") from None
    begin = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}[kind]
    return Tracker(kind, lambda: begin(module, project or "llama4", _plain(run), config), say)


def _trackio(module: Any, project: str, run: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    module.init(project=project, name=run, config=dict(config), resume="allow")
    return lambda step, scalars: module.log(dict(scalars), step=step), module.finish


def _wandb(module: Any, project: str, run: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    here = module.init(project=project, name=run, id=run, config=dict(config), resume="allow")
    return lambda step, scalars: here.log(dict(scalars), step=step), here.finish


def _mlflow(module: Any, project: str, run: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    module.set_experiment(project)
    known = module.search_runs(filter_string=f"attributes.run_name = '{run}'", max_results=1, output_format="list")
    module.start_run(run_id=known[0].info.run_id) if known else module.start_run(run_name=run)
    return lambda step, scalars: module.log_metrics(
        {_plain(n): x for n, x in scalars.items()}, step=step
    ), module.end_run


def _plain(name: str) -> str:
    return re.sub(r"[^\w./-]", "-", name)
