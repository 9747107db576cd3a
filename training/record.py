"""A run's record beside its arrays: the configuration as JSON, read back, and compared where a run goes on."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Container, Mapping
from typing import Any

from etils import epath

from training.config import RunConfig

CONFIG = "config.json"
"""Of a run's folder; a Hugging Face folder calls its own so, too."""
RESUMABLE = ("name", "out", "mesh", "train.steps", "train.log_every", "train.eval_every", "train.eval_batches",
             "train.checkpoint_every", "train.checkpoint_keep", "train.checkpoint_keep_every", "safety")  # fmt: skip
"""Config fields that a resumed run may change freely; of a learner all but its model, too."""
RESUMABLE_OF_A_STAGE = ("mesh", "microbatches", "remat", "schedule")
"""Likewise of a stage that has begun; one that has not may change as it likes, or come or go."""


def write_config(folder: epath.Path, cfg: RunConfig) -> None:
    """The resolved config, `dataclasses.asdict` as JSON, into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")


def run_record(cfg: RunConfig, tokenizer: str) -> dict[str, Any]:
    """What is stored beside the arrays: the resolved config and the tokenizer's hash, as JSON has them."""
    return json.loads(json.dumps({"config": dataclasses.asdict(cfg), "tokenizer": tokenizer}))


def check_resumable(stored: Mapping[str, Any], current: Mapping[str, Any], where: str, done: int) -> list[str]:
    """Lines `field: old -> new` of changes that are harmless after `done` steps; ValueError for one that would make it
    another run. A field that came after the checkpoint was written had its default there."""
    if stored["tokenizer"] != current["tokenizer"]:
        raise ValueError(f"{where} was trained with tokenizer {stored['tokenizer']}, not {current['tokenizer']}")
    old = with_defaults(stored["config"])
    stages = [side["config"].get("stages", ()) for side in (stored, current)]
    begun = {str(i) for some in stages for i, stage in enumerate(some) if stage["after"] < done}
    changes = changed(old, current["config"])
    for field, (was, now) in changes.items():
        if not _free(field, begun):
            raise ValueError(
                f"{where} was trained with {field} = {was!r}, not {now!r}: restore that value, or use another folder"
            )
    return [f"{field}: {was} -> {now}" for field, (was, now) in changes.items()]


def changed(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Of two trees of JSON the leaves that differ, (old, new) by their dotted paths; "absent" where there is none."""
    pairs, before, after = {}, flat(old), flat(new)
    for path in sorted({*before, *after}):
        pairs[path] = before.get(path, "absent"), after.get(path, "absent")
    return {path: (was, now) for path, (was, now) in pairs.items() if was != now}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of JSON by their dotted paths, in which the items of a list are numbered."""
    if isinstance(tree, list):
        tree = {str(i): sub for i, sub in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _free(field: str, begun: Container[str]) -> bool:
    parts = field.split(".")
    if parts[0] == "stages":
        return parts[1] not in begun or parts[2] in RESUMABLE_OF_A_STAGE
    if parts[0] == "learners":
        return len(parts) > 2 and parts[2] != "model"
    return any(field == name or field.startswith(f"{name}.") for name in RESUMABLE)


def config_from_json(tree: Mapping[str, Any]) -> RunConfig:
    """The RunConfig whose `dataclasses.asdict` is `tree`; ValueError naming an unknown field, or a missing one that has
    no default. A field that came after `tree` was written had its default there."""
    return _build(RunConfig, tree, "config")


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, and the defaults of those fields that came after it was written."""
    return _with_defaults(RunConfig, tree)


def _with_defaults(kind: Any, value: Any) -> Any:
    """JSON of a value of type `kind`, and the defaults of those fields that it lacks."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, Mapping):
        return {key: _with_defaults(args[1], sub) for key, sub in value.items()}
    if origin is tuple and isinstance(value, list):
        return [_with_defaults(args[0], sub) for sub in value]
    if origin is types.UnionType:  # of a dataclass and None
        kind = args[0]
    if not dataclasses.is_dataclass(kind) or not isinstance(value, Mapping):
        return value
    hints, filled = typing.get_type_hints(kind), dict(value)
    for field in dataclasses.fields(kind):
        if field.name in filled:
            filled[field.name] = _with_defaults(hints[field.name], filled[field.name])
        elif field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            filled[field.name] = field.default_factory()
    return json.loads(json.dumps(filled, default=dataclasses.asdict))


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        _expect(value, Mapping, where)
        return {key: _build(args[1], sub, f"{where}.{_plain(key)}") for key, sub in value.items()}
    if origin is tuple:
        _expect(value, (list, tuple), where)
        return tuple(_build(args[0], sub, f"{where}.{i}") for i, sub in enumerate(value))
    if origin is types.UnionType:  # of a dataclass and None
        return None if value is None else _build(args[0], value, where)
    if origin is typing.Literal:
        if not isinstance(value, str | int) or value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r:.100}")
        return value
    if kind is float:
        try:
            return float(_expect(value, (int, float), where))
        except OverflowError:
            raise ValueError(f"{where} is too large") from None
    if not dataclasses.is_dataclass(kind):
        return _expect(value, {int: int, str: str, bool: bool}.get(kind, object), where)
    _expect(value, Mapping, where)
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"{where}.{_plain(unknown[0])} is no field of {kind.__name__}")  # pyright: ignore
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(value)):
        raise ValueError(f"{where}.{missing[0]} is missing")
    return kind(**{key: _build(hints[key], sub, f"{where}.{key}") for key, sub in value.items()})  # pyright: ignore


def _plain(name: str) -> str:
    """For a message, whatever a file holds as a name."""
    return name if name.isascii() and name.isprintable() and name and len(name) < 60 else ascii(name)[:60]


def _expect(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where} must be {names}, not {value!r:.100}")
    return value
