"""Other programs' pages of runs, beside TensorBoard: trackio, Weights & Biases, MLflow, each imported when asked for.

They get the same scalars as TensorBoard, from the first process. A tracker that fails does not end a run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

KINDS = ("trackio", "wandb", "mlflow")
"""Also the names of the extras that bring them."""


class Tracker(NamedTuple):
    """A run in a tracker."""

    log: Callable[[int, Mapping[str, float]], object]
    """A step's scalars."""
    finish: Callable[[], object]


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
    log, finish = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}[kind](
        module, project or "llama4", _plain(run), config
    )
    return Tracker(_kept_going(kind, log, say), _kept_going(kind, finish, say))


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


def _kept_going(kind: str, call: Callable[..., object], say: Callable[[str], object]) -> Callable[..., None]:
    """Calls that fail are spoken of once."""
    failed: list[Exception] = []

    def guarded(*arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if not failed:
                say(f"{kind} failed, and the run goes on: {' '.join(str(error).split()) or type(error).__name__}")
            failed.append(error)

    return guarded


def _plain(name: str) -> str:
    return re.sub(r"[^\w./-]", "-", name)
