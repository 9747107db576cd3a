"""`llama4 train NAME`: trains a preset; started again, it goes on from its newest checkpoint.

`--from RUN@STEP` begins a run from a checkpoint of another one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import configs
from launch import distributed, overrides
from launch.place import ALONE, Place
from training import exits
from training.config import RunConfig

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, also=", or the folder of a run to go on with")
    parser.add_argument("--from", dest="source", metavar="RUN[@STEP]", default="",
                        help="begin a new run, of NAME or as RUN was, from RUN's checkpoint of STEP (default: the "
                        "newest), with its weights, optimizer, step and place in the data")  # fmt: skip
    parser.add_argument("--profile", metavar="steps=FIRST-LAST", default="", help="trace these steps for xprof, into "
                        "the run's profile/; SIGUSR1 to the first process traces the next three")  # fmt: skip
    parser.add_argument("--track", action="append", default=[], metavar="KIND[:PROJECT]",
                        help="also log to trackio, wandb or mlflow (extras of those names); repeatable")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the closing summary as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    began = time.time()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext(), refusals(args):
        cfg = configuration(args)
        place = distributed.initialize(cfg)
        with watched(cfg, args, place):
            summary = train(cfg, place, began)
    if args.json and place.process == 0:
        print(json.dumps(summary))
    return status(summary)


@contextlib.contextmanager
def watched(cfg: RunConfig, args: argparse.Namespace, place: Place) -> Iterator[None]:
    """The profiler and the trackers, by the first process, while the block runs."""
    from training import metrics, profile, trackers

    first, last = profile.parse(args.profile) if args.profile else (0, 0)
    if place.process:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(profile.Profiler(cfg.folder, first, last))
        for asked in args.track:
            tracker = trackers.start(asked, cfg.folder.rstrip("/").rpartition("/")[2], dataclasses.asdict(cfg))
            stack.callback(tracker.finish)
            metrics.SINKS.append(tracker.log)
            stack.callback(metrics.SINKS.remove, tracker.log)
        yield


@contextlib.contextmanager
def refusals(args: argparse.Namespace) -> Iterator[None]:
    """Leave word in the folder of a job's run of what would only fail again, for who may start the job again."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        folder = next((words[0] for option, *words in args.overrides if option == "--out" and words), "")
        if folder and "LLAMA4_PROCESSES" in os.environ:  # started by what llama4 launch rendered
            from training.status import refuse

            refuse(folder, distributed.who(), error)
        raise


def configuration(args: argparse.Namespace) -> RunConfig:
    """What was named, with its overrides, and where it begins."""
    if not args.source:
        return overrides.apply(find(args.name), args)
    from training import fork

    run, _ = fork.parts(fork.find(args.source))
    cfg = overrides.apply(find(args.name or run), args)
    if cfg.folder.rstrip("/") == run.rstrip("/"):
        raise ValueError(f"--from {args.source} begins another run: give its folder, --out DIR")
    return dataclasses.replace(cfg, fork=fork.find(args.source, cfg.folder))


def find(name: str) -> RunConfig:
    """A preset, or the configuration of the run in a folder."""
    if not name:
        raise ValueError(f"a preset or a run's folder is needed; the presets are {', '.join(configs.PRESETS)}")
    if name in configs.PRESETS:
        return configs.find(name)
    from etils import epath

    stored = epath.Path(name) / "config.json"
    if not stored.exists():
        if "/" in name or epath.Path(name).exists():
            raise FileNotFoundError(f"no run in {name}: {stored} is missing")
        return configs.find(name)
    from training.record import config_from_json
    from training.safetensors_header import read_json

    try:
        return dataclasses.replace(config_from_json(read_json(stored)), out=name)
    except ValueError as error:
        raise ValueError(f"{stored} is not a run's configuration: {error}") from error


def train(cfg: RunConfig, place: Place = ALONE, began: float = 0.0) -> dict[str, Any]:
    """Open the data and train; the summary of `training.loop.train`. `began`: when this start did (default: now)."""
    from launch.startup import open_corpus
    from training import loop
    from training import status as status_of

    corpus = open_corpus(cfg, print if place.process == 0 else lambda _: None)
    distributed.agree(place, {"tokenizer": corpus.tokenizer.hash, "data": corpus.hash})
    facts = dict(how=place.how, hosts=place.hosts or [place.host], job=place.job, time=round(began or time.time(), 3))
    return loop.train(cfg, corpus, begun=partial(status_of.begin, cfg.folder, facts))


def status(summary: dict[str, Any]) -> int:
    """Of the process: done, or stopped by SIGTERM after a last checkpoint, to be started again, or 130 by Ctrl-C."""
    if summary["signal"] == signal.SIGTERM:
        return exits.STOPPED
    return 128 + summary["signal"] if summary["signal"] else exits.DONE
