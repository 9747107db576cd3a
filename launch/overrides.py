"""Overrides of a preset from the command line: `--train.steps 100 --mesh.expert 8 --data.weights code 0.3 prose 0.7`.

An option is the path of a field of RunConfig, in which `-` and `_` are the same, and takes the words up to the next
option. In a run with one learner `--learners.NAME.` may be left out: `--model.num-layers 8`, `--remat block`.
`llama4 train NAME --help` lists a preset's fields; that page is tyro's, made from the same dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import configs
from training.config import Learner, RunConfig, Stage


def add_name(parser: argparse.ArgumentParser, default: str = "", also: str = "", **how: Any) -> None:
    """The preset's name, `args.name`; `--help` after a name shows its fields, without one the presets.

    `how` it is read, if not as one word.
    """
    parser.usage = f"{parser.prog} {'[NAME]' if default else 'NAME'} [--FIELD VALUE ...] [options]"
    what = f"a preset{also}{f' (default: {default})' if default else ''}"
    given: dict[str, Any] = dict(metavar="NAME", nargs="?", default=default, help=what) | how
    parser.add_argument("name", **given)
    parser.add_argument("-h", "--help", nargs=0, action=_Help, help="show this; after a NAME, all its fields")
    width = max(map(len, configs.PRESETS))
    lines = "\n".join(
        f"  {name:{width}} {(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in configs.PRESETS.items()
    )
    parser.epilog = (
        f"presets:\n{lines}\n\n{parser.prog} NAME --help lists the fields of a preset: each can be given on the "
        "command line, e.g.\n  --train.steps 100 --data.sources a=DIR b=embedded:code --data.weights a 0.7 b 0.3"
    )


class _Help(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if namespace.name and namespace.name != parser.get_default("name"):
            print_fields(configs.find(namespace.name), f"{parser.prog} {namespace.name}")
        else:
            parser.print_help()
        parser.exit()


def split(argv: list[str], known: list[str]) -> tuple[list[str], list[list[str]]]:
    """(words that belong to the `known` options or to none, the other options, each with its words)."""
    words: list[str] = []
    given: list[list[str]] = []
    target = words
    for word in argv:
        if word.startswith("--") and word.split("=")[0] not in known:
            option, equals, value = word.partition("=")
            target = [option, value] if equals else [option]
            given.append(target)
        else:
            if word.startswith("-") and word.split("=")[0] in known:
                target = words
            target.append(word)
    return words, given


def apply(cfg: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The configuration with `args.overrides` in place; ValueError names the option and the nearest valid choice.

    A tokenizer that is trained on the corpus has `data.vocab_size` tokens, and models that had as many follow it.
    """
    fields = leaves(cfg)
    prefix = _only_learner(cfg)
    changes: dict[str, Any] = {}
    for option, *words in args.overrides:
        path = option.removeprefix("--").replace("-", "_")
        path = path if path in fields else prefix + path
        if path not in fields and option.startswith("--stages") and not cfg.stages:
            raise ValueError(f"no field {option}: {cfg.name} has no stages, which are written in a preset (configs/)")
        if path not in fields:
            near = _nearest(option, [*fields, *(known.removeprefix("--") for known in args.options)], prefix)
            where = "; stages, and a mesh or schedule of theirs, are written in a preset" * option.startswith(
                "--stages"
            )
            raise ValueError(f"no option or field {option}; the nearest is {near}{where}")
        changes[path] = _value(option, fields[path], words)
    size = changes.get("data.vocab_size")
    if size is not None and not changes.get("data.tokenizer", cfg.data.tokenizer):
        for name, learner in cfg.learners.items():
            if learner.model.vocab_size == cfg.data.vocab_size:
                changes.setdefault(f"learners.{name}.model.vocab_size", size)
    return _rebuild(cfg, changes, "")


def check_vocabulary(cfg: RunConfig, size: int | None = None) -> None:
    """ValueError where a model's vocabulary differs from the tokenizer's `size`, by default the one to be trained."""
    if size is None and cfg.data.tokenizer:
        return
    trained = "data.synthetic" if cfg.data.synthetic else "the tokenizer trained here"
    source = f"the tokenizer {cfg.data.tokenizer}" if cfg.data.tokenizer else trained
    size = cfg.data.vocab_size if size is None else size
    for name, learner in cfg.learners.items():
        # A table larger than a given tokenizer has rows to spare, as published models do.
        if learner.model.vocab_size < size or (learner.model.vocab_size != size and not cfg.data.tokenizer):
            field = "--model.vocab-size" if len(cfg.learners) == 1 else f"--learners.{name}.model.vocab-size"
            raise ValueError(
                f"{name}'s vocab_size is {learner.model.vocab_size} but {source} has {size} tokens: give {field} {size}"
            )


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> type of every field that can be overridden."""
    found: dict[str, Any] = {}
    for name, child, kind in _children(node):
        if dataclasses.is_dataclass(child) or name in ("learners", "stages"):
            found.update(leaves(child, f"{prefix}{name}."))
        elif child is not None:  # a frozen learner has no optimizer's fields
            found[prefix + name] = kind
    return found


def _children(node: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of a dataclass's fields, or of the learners, or of the stages by their numbers."""
    if isinstance(node, dict | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        yield from ((str(name), child, type(child)) for name, child in items)
    else:
        hints = typing.get_type_hints(type(node))
        yield from ((f.name, getattr(node, f.name), hints[f.name]) for f in dataclasses.fields(node))


def _rebuild(node: Any, changes: dict[str, Any], prefix: str) -> Any:
    """The tree with its changed parts built anew, each once, so that it is validated as a whole."""
    new = {}
    for name, child, _ in _children(node):
        path = prefix + name
        if path in changes:
            new[name] = changes[path]
        elif any(changed.startswith(f"{path}.") for changed in changes):
            new[name] = _rebuild(child, changes, f"{path}.")
    if isinstance(node, tuple):
        return tuple(new.get(str(i), child) for i, child in enumerate(node))
    return {**node, **new} if isinstance(node, dict) else dataclasses.replace(node, **new)


def _value(option: str, kind: Any, words: list[str]) -> Any:
    """The words of an option as a value of its field's type."""
    if kind == dict[str, str]:
        return named(option, words)
    if typing.get_origin(kind) is dict:
        flat = [part for word in words for part in word.replace("=", ",").split(",") if part]
        if len(flat) % 2:
            raise ValueError(f"{option} takes pairs, e.g. code 0.3 prose 0.7, not {' '.join(words)!r}")
        return {key: _value(f"{option} {key}", typing.get_args(kind)[1], [v]) for key, v in zip(*[iter(flat)] * 2)}  # noqa: B905
    if not words and kind is bool:
        return True
    if not words:
        raise ValueError(f"{option} needs a value")
    if len(words) != 1:
        raise ValueError(f"{option} takes one value, not {len(words)}: {' '.join(words)}")
    word = words[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
    if choices:
        if word.lower() not in choices:
            near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0)[0]
            raise ValueError(f"{option} is one of {', '.join(choices)}, not {word!r}; the nearest is {near!r}")
        return word.lower() == "true" if kind is bool else word.lower()
    try:
        return kind(word)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{option} is {what}, not {word!r}") from None


def named(option: str, words: list[str]) -> dict[str, str]:
    """`NAME PLACE` or `NAME=PLACE`, any number; a place may hold `=` and commas itself."""
    named, name = {}, ""
    for word in words:
        if name:
            named[name], name = word, ""
        elif "=" in word:
            key, _, place = word.partition("=")
            named[key] = place
        else:
            name = word
    if name or not named:
        raise ValueError(f"{option} takes pairs, e.g. web=DIR code=embedded:code, not {' '.join(words)!r}")
    return named


def _only_learner(cfg: RunConfig) -> str:
    """What may be left out in front of a learner's fields."""
    return f"learners.{next(iter(cfg.learners))}." if len(cfg.learners) == 1 else ""


def _nearest(option: str, names: list[str], prefix: str) -> str:
    """The closest option, by its whole path, its first or its last part: `--steps` means `--train.steps`."""
    wanted = option.removeprefix("--").replace("-", "_")

    def likeness(path: str) -> float:
        short = path.removeprefix(prefix)
        ends = (path, short, short.split(".")[0], path.rsplit(".", 1)[-1])
        return max(difflib.SequenceMatcher(None, wanted, end).ratio() for end in ends)

    return "--" + max(names, key=likeness).removeprefix(prefix).replace("_", "-")


def print_fields(cfg: RunConfig, prog: str) -> None:
    """All fields with their meaning and value; those of a single learner under their short names."""
    import tyro

    rest = {name: (hint, value) for name, value, hint in _children(cfg) if name in ("data", "mesh", "train", "safety")}
    stages = {f"stage_{i}": (Annotated[Stage, tyro.conf.arg(name=f"stages.{i}")], s) for i, s in enumerate(cfg.stages)}
    fork = "RUN@STEP that the run began from; --from finds the step."
    texts = {"out": (Annotated[str, tyro.conf.arg(help="The run's folder; empty: runs/NAME.")], cfg.out),
             "fork": (Annotated[str, tyro.conf.arg(help=fork)], cfg.fork)}  # fmt: skip
    learners: dict[str, Any] = {"learners": (dict[str, Learner], cfg.learners)}
    if len(cfg.learners) == 1:
        learners = {"learner": (Annotated[Learner, tyro.conf.arg(name="")], next(iter(cfg.learners.values())))}
    shown = {**texts, **rest, **stages, **learners}
    fields = [
        (name, hint, dataclasses.field(default_factory=lambda value=value: value))
        for name, (hint, value) in shown.items()
    ]
    kind: Any = dataclasses.make_dataclass("Fields", fields, frozen=True)
    default = kind()
    about = re.sub(r"\n+", "\n\n", inspect.getdoc(configs.PRESETS[cfg.name]) or "")  # tyro joins single lines
    tyro.cli(kind, default=default, prog=prog, args=["--help"], description=about,
             config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands))  # fmt: skip
