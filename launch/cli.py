"""The `llama4` command: a table of sub-commands, and what becomes of errors and signals.

A command is a module with `add_arguments(parser)` and `run(args) -> exit status`. It imports nothing heavy at its top,
so that `llama4 X --help` answers at once. A command with actions, `llama4 data inspect`, is a module with `ACTIONS`, a
table like `COMMANDS` of such modules. Options that a command with `TAKES_OVERRIDES` does not know are fields of the
run's configuration (`launch/overrides.py`); they arrive as `args.overrides`.

Exit statuses are those of `training/exits.py`; 130 is stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from launch import overrides
from training import exits
from training.redact import redact

COMMANDS = {
    "demo": ("launch.demo", "train a tiny teacher and two students here, export, verify, let them write, report"),
    "train": ("launch.train", "train a preset, with any of its fields overridden"),
    "launch": ("launch.launch", "train on several hosts: SLURM, Kubernetes, SkyPilot, Ray, TPU VMs, MPI, or here"),
    "status": ("launch.status", "how far a run is, whether it goes on, and what became of its time"),
    "board": ("launch.board", "a page about a run under way, which refreshes itself"),
    "targets": ("launch.targets", "write a teacher's soft targets for students to read, or show what a folder holds"),
    "checkpoint": ("launch.checkpoint", "list, verify or compare what a run has kept"),
    "export": ("launch.export", "turn a run's checkpoint into a Hugging Face folder"),
    "import": ("launch.import_", "turn a Hugging Face folder into a run's checkpoint"),
    "verify": ("launch.verify", "check a Hugging Face folder's files, its logits layer by layer, and its source"),
    "diff": ("launch.diff", "compare two checkpoints of any kind, weight by weight"),
    "continue": ("launch.continue_", "train a Hugging Face folder on, perhaps taught by another, export and verify"),
    "generate": ("launch.generate", "continue prompts, or answer them"),
    "inspect": ("launch.inspect", "show a model's layers and count its parameters"),
    "report": ("launch.report", "write a page about a run, or about several side by side"),
    "doctor": ("launch.doctor", "what is installed here, which devices there are, and how fast they are"),
    "bench": ("launch.bench", "time a preset's step on synthetic tokens"),
    "plan": ("launch.plan", "what a run needs and how fast it can be, without its devices"),
    "data": ("launch.data", "show what a run's batches hold"),
    "tokenizer": ("launch.tokenizer", "train a tokenizer, encode and decode with one"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as the ValueErrors that `main` prints in one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, conflict_handler="resolve", **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """The exit status of a command. A process of several that fails ends here: nothing waits for it."""
    try:
        status = _run(argv)
    except Exception:
        if launched := _of_several():
            traceback.print_exc()
            launched.leave(exits.LOST)
        raise
    if launched := _of_several():
        launched.leave(status)
    return status


def _of_several() -> ModuleType | None:
    """`launch.distributed`, in a process that has joined others."""
    launched = sys.modules.get("launch.distributed")
    return launched if launched and launched.joined else None


def _run(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, run = _parse(argv)
        return run(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if not _is_input(error):
            raise
        _complain(" ".join(str(error).split()))
        return exits.WRONG
    except FloatingPointError as error:
        _complain(error)
        return exits.FAILED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a teacher gone, a disk full, a folder that another run writes
        if not _is_ours(error):
            raise
        _complain(error.strerror if error.errno else error)
        return getattr(error, "status", exits.FAILED)
    except KeyboardInterrupt:
        print("llama4: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _complain(what: object) -> None:
    """One line on stderr, without secrets."""
    print(f"llama4: error: {redact(str(what))}", file=sys.stderr)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], int]]:
    parser = Parser(
        prog="llama4",
        description="Pretrain and co-distil the Llama 4 family in JAX.",
        epilog="llama4 COMMAND --help says more; llama4 train --help lists the presets.",
    )
    module, chosen = _choose(parser, "command", COMMANDS, argv)
    if actions := getattr(module, "ACTIONS", None):
        module, chosen = _choose(chosen, "action", actions, argv[1:])
    module.add_arguments(chosen)
    given: list[list[str]] = []
    options = [*chosen._option_string_actions]
    if getattr(module, "TAKES_OVERRIDES", False):
        argv, given = overrides.split(argv, options)
    args, extra = parser.parse_known_args(argv, argparse.Namespace(overrides=given, options=options))
    if extra:
        near = difflib.get_close_matches(extra[0], options, n=1)
        hint = f"; the nearest is {near[0]}" if near else f" (see {chosen.prog} --help)"
        raise ValueError(f"unrecognized arguments: {' '.join(extra)}{hint}")
    return args, module.run


def _choose(
    parser: Parser, kind: str, table: Mapping[str, tuple[str, str]], argv: list[str]
) -> tuple[ModuleType, Parser]:
    """The module that the first word names, and its parser; ValueError names the nearest. --help ends the program."""
    known = parser.add_subparsers(dest=kind, required=True, parser_class=Parser)
    parsers = {name: known.add_parser(name, help=line, description=line) for name, (_, line) in table.items()}
    name = argv[0] if argv else ""
    if name not in table:
        if name and not name.startswith("-"):
            near = difflib.get_close_matches(name, table, n=1, cutoff=0) or [next(iter(table))]
            raise ValueError(f"no {kind} {name!r}; the nearest is {near[0]!r} (all: {', '.join(table)})")
        if not argv:
            parser.error(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} is needed: {', '.join(table)}")
        parser.parse_args(argv)  # --help, or an error
        raise AssertionError
    return importlib.import_module(table[name][0]), parsers[name]


def _is_input(error: Exception) -> bool:
    """Whether the error speaks of what the user gave: a missing file, or a ValueError raised by this project's code, or
    its ImportError, which says what to install for what was asked.

    A ValueError out of a library is unforeseen, and its traceback is worth more than one line.
    """
    if isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, ModuleNotFoundError):  # a broken installation: which import it was is worth knowing
        return False
    return _is_ours(error)


def _is_ours(error: Exception) -> bool:
    """Whether this project's code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(__file__).resolve().parent.parent
    packages = ("launch", "configs", "training", "data", "llama4_jax")
    return any(Path(frame.f_code.co_filename).is_relative_to(ours / package) for package in packages)


if __name__ == "__main__":
    sys.exit(main())
