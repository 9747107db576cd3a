"""A run that begins from another's checkpoint, RUN@STEP: with its weights, optimizers, step and place in the data.

The fork may have other data, rows, rates or devices; what it may not have is other arrays. Weights alone, at step 0 and
for a learner among others, are what a learner's `init` takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from etils import epath

from data import tokenizer
from training.checkpoint import Checkpoints, named_leaves
from training.config import RunConfig
from training.record import changed, config_from_json, run_record, with_defaults
from training.safetensors_header import read_json
from training.state import init_state


def find(source: str, into: str = "", option: str = "--from") -> str:
    """RUN@STEP of a checkpoint that is there, for a RUN alone its newest; else a line with the nearest that is there.

    `into` is the new run's folder: where it has begun from this RUN already, RUN alone means the same step again.
    `option` is what named the source, for messages.
    """
    run, at, step = source.rpartition("@")
    if not at or epath.Path(source).exists():
        run, step = source, ""
    elif not step.isdecimal():
        raise ValueError(f"{option} takes RUN or RUN@STEP, a step being a whole number, not {source!r}")
    begun = epath.Path(into) / "config.json"
    before = read_json(begun).get("fork") if into and begun.exists() else ""
    if not step and isinstance(before, str) and before.rpartition("@")[0] == run:
        return before
    if not (epath.Path(run) / "checkpoints").exists():
        raise FileNotFoundError(f"{option} {source}: no checkpoints in {run}{_nearest(epath.Path(run))}")
    with Checkpoints(run) as checkpoints:
        return f"{run}@{checkpoints.find(int(step) if step else None)}"


def parts(fork: str) -> tuple[str, int]:
    """(RUN, STEP) of RUN@STEP."""
    run, _, step = fork.rpartition("@")
    return run, int(step)


def differences(cfg: RunConfig, record: Mapping[str, Any], tokens: str) -> list[str]:
    """Lines `field: there -> here` about a fork and the checkpoint with this record; ValueError, naming the fields,
    where their arrays or tokenizers differ."""
    if record["tokenizer"] != tokens:
        file = tokenizer.find(parts(cfg.fork)[0]) or "that of its training"
        raise ValueError(f"{cfg.fork} has another tokenizer than this run: give --data.tokenizer {file}")
    source = config_from_json(record["config"])
    if list(source.learners) != list(cfg.learners):
        raise ValueError(
            f"{cfg.fork} has the learners {', '.join(source.learners)}, this run {', '.join(cfg.learners)}: for "
            f"weights alone give a learner's init, run:{parts(cfg.fork)[0]}"
        )
    changes = {
        field: f"{was} -> {now}"
        for field, (was, now) in changed(with_defaults(record["config"]), run_record(cfg, tokens)["config"]).items()
        if field not in ("name", "out", "fork")
    }
    if _shapes(source) != _shapes(cfg):
        shaping = (".model.", ".optimizer.kind", ".optimizer.moment_dtype")
        fields = [f"{f}: {c}" for f, c in changes.items() if any(part in f for part in shaping)]
        fields = fields or [f"{f}: {c}" for f, c in changes.items() if f.endswith(".optimizer")]  # frozen or not
        raise ValueError(f"{cfg.fork} holds other arrays than this run needs; what differs: {'; '.join(fields)}")
    return [f"{field}: {change}" for field, change in changes.items()]


def _shapes(cfg: RunConfig) -> dict[str, Any]:
    leaves = named_leaves(jax.eval_shape(partial(init_state, cfg)))
    return {name: [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)] for name, leaf in leaves.items()}


def _nearest(run: epath.Path) -> str:
    """Of the runs beside the one that was named, the one named most like it."""
    beside = run.parent
    runs = [str(f) for f in beside.iterdir() if (f / "checkpoints").exists()] if beside.is_dir() else []
    near = difflib.get_close_matches(str(run), sorted(runs), n=1, cutoff=0)
    return f"; the nearest run is {near[0]}" if near else ""
