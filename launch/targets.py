"""`llama4 targets write NAME --out DIR` and `llama4 targets info DIR`: a teacher's soft targets, written once; `llama4
targets serve NAME --listen HOST:PORT`: made for students of other programs while they train."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from launch import overrides

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.target_record import Form

TAKES_OVERRIDES = True
SIZES = {"topk": (64, 0), "sample": (0, 12), "stratified": (32, 16)}
"""Top and draws by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("write", "serve", "info"), help="write: run a preset's teacher over its "
                        "rows, and go on where that was interrupted; serve: let it answer students whose "
                        "distillation.teacher is stream:HOST:PORT; info: what a folder of targets holds")  # fmt: skip
    overrides.add_name(parser, also=" with a frozen teacher, or one learner and its init; for info, the folder")
    parser.usage = (
        f"{parser.prog} write NAME --out DIR [--FIELD VALUE ...] [options]\n       {parser.prog} serve NAME "
        f"[--listen HOST:PORT] [--FIELD VALUE ...] [options]\n       {parser.prog} info DIR"
    )
    parser.add_argument("--out", metavar="DIR", default="", help="the folder of targets to write or to add to")
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:0",
                        help="of serve: where students connect; port 0 takes a free one, which is printed (default: "
                        "127.0.0.1:0). Nothing is encrypted and nobody is asked who they are: keep it on a private "
                        "network")  # fmt: skip
    parser.add_argument("--kind", choices=tuple(SIZES), default="stratified",
                        help="topk: the largest and the rest as one; sample: draws; stratified: the largest, and draws "
                        "from the rest (default: stratified)")  # fmt: skip
    parser.add_argument("--top", metavar="K", type=int, help="the largest entries (default: 64 of topk, 32 else)")
    parser.add_argument("--draws", metavar="M", type=int, help="entries drawn (default: 12 of sample, 16 else)")
    parser.add_argument("--batches", metavar="N", type=int, help="of training, from the first (default: all steps)")
    parser.add_argument("--learner", metavar="NAME", default="", help="who teaches (default: the only frozen learner)")
    parser.add_argument("--json", action="store_true", help="print what is there as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    if not args.name:
        raise ValueError(f"llama4 targets {args.action} needs {'a folder' if args.action == 'info' else 'a preset'}")
    if args.action == "serve":
        serve(args)
        return 0
    if args.action == "info":
        if args.overrides:
            raise ValueError(f"llama4 targets info takes no field {args.overrides[0][0]}")
        facts = describe(args.name)
    else:
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            facts = write(args)
    print(json.dumps(facts)) if args.json else _print(facts)
    return 0


def write(args: argparse.Namespace) -> dict[str, Any]:
    """What the teacher wrote, and what the folder then holds."""
    form, out = _form(args), args.out
    if not out:
        raise ValueError("targets are written into a folder of their own: give --out DIR")
    if args.batches is not None and args.batches < 1:
        raise ValueError(f"--batches must be at least 1, not {args.batches}")
    from launch.startup import open_corpus
    from launch.train import find
    from training.teach import find_teacher, teach

    cfg = overrides.apply(find(args.name), args)
    find_teacher(cfg, args.learner)  # before the corpus is read
    written = teach(cfg, open_corpus(cfg), out, form, learner=args.learner, batches=args.batches)
    return describe(out) | dict(written=written)


def serve(args: argparse.Namespace) -> None:
    """Answer students until SIGTERM or SIGINT, and then what they asked before."""
    form = _form(args)
    for option in ("out", "batches", "json"):
        if getattr(args, option):
            raise ValueError(f"llama4 targets serve takes no --{option}")
    from launch.train import find
    from training.serve import make_server, stopped_by_signals
    from training.stream import place
    from training.teach import find_teacher

    host, port = place(args.listen)
    cfg = overrides.apply(find(args.name), args)
    name = find_teacher(cfg, args.learner)
    tokenizer = _tokenizer_hash(cfg, name)
    server = make_server(cfg, tokenizer, form, host, port, learner=name, log=partial(print, flush=True))
    with stopped_by_signals(server):
        server.run()


def _tokenizer_hash(cfg: RunConfig, name: str) -> str:
    """Of the tokenizer beside the teacher's weights, else of the run's own; only that may take its corpus."""
    from data import tokenizer
    from launch.startup import open_corpus

    beside = tokenizer.find(cfg.learners[name].init.partition(":")[2])
    if not cfg.data.tokenizer and beside is None:
        return open_corpus(cfg).tokenizer.hash
    found = tokenizer.load(cfg.data.tokenizer or beside)  # pyright: ignore
    overrides.check_vocabulary(cfg, found.vocab_size)
    return found.hash


def _form(args: argparse.Namespace) -> Form:
    from training.target_record import Form

    top, draws = SIZES[args.kind]
    return Form(args.kind, top if args.top is None else args.top, draws if args.draws is None else args.draws)


def describe(folder: str) -> dict[str, Any]:
    """The manifests of a folder of targets, as one."""
    from training.targets import Reader

    with Reader(folder) as reader:
        counts = reader.counts()
        return dict(folder=folder, **reader.identity.to_json(), **counts,
                    bytes_per_token=round(counts["bytes"] / counts["tokens"], 2))  # fmt: skip


def _print(facts: dict[str, Any]) -> None:
    f = facts
    entries = {"topk": f"the {f['top']} largest and the rest as one", "sample": f"{f['draws']} draws",
               "stratified": f"the {f['top']} largest, and {f['draws']} draws from the rest"}[f["kind"]]  # fmt: skip
    print(f"targets    {f['folder']}: {f['tokens']:,} tokens in {f['pieces']:,} pieces, {f['shards']} shards")
    print(f"form       {f['kind']}: {entries}, at temperature {f['temperature']:g}; version {f['version']}")
    print(f"size       {f['bytes'] / 1e6:,.1f} MB, {f['bytes_per_token']} bytes a token")
    print(f"teacher    {f['teacher']}, of {f['source'] or 'an unnamed source'} at step {f['teacher_step']:,}")
    print(f"tokenizer  {f['vocab_size']:,} tokens, sha256 {f['tokenizer'][:16]}")
