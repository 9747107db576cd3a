"""`llama4 data ledger RUN[@STEP]`: which documents a checkpoint has seen, how often, and of which domains."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.loader import Corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[@STEP]", help="a run's folder, and the step of a checkpoint (the newest)")
    parser.add_argument("--documents", metavar="FILE", help='also write a line {"domain", "document", "pass", "stage", '
                        '"lane"} for each document read; "document" is its index in the domain, from 0')  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the counts as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from etils import epath

    from data import tokenizer
    from data.loader import Corpus, ledger
    from launch.startup import cache_folder
    from training import fork
    from training.checkpoint import Checkpoints
    from training.record import config_from_json

    folder, step = fork.parts(fork.find(args.run, option="data ledger"))
    with Checkpoints(folder) as checkpoints:
        place, record = checkpoints.place(step), checkpoints.record(step)
    cfg = config_from_json(record["config"]).at(step)
    log = partial(print, file=sys.stderr)
    corpus = Corpus.open(cfg.data, cache_folder(), log, tokenizer.load(folder))
    facts = dict(run=folder, step=step, **count(corpus, place))
    if args.documents:
        with epath.Path(args.documents).open("w") as file:
            written = sum(bool(file.write(json.dumps(line) + "\n")) for line in ledger(corpus, place))
        log(f"{written:,} documents listed in {args.documents}")
    print(json.dumps(facts)) if args.json else _print(facts)
    return 0


def count(corpus: Corpus, place: dict[str, Any]) -> dict[str, Any]:
    """By domain: documents read into rows, those that are still to be handed out of lanes' windows among them, and the
    passes that these make; and exactly the tokens in the rows that were handed out, since the stage began (with their
    share, beside the one wanted) and in the whole run.

    ValueError where the documents are not those that the checkpoint's run read last.
    """
    from data.lanes import LaneState
    from data.loader import documents_read, tokens_of_stages

    stream = place["stream"]
    if stream["corpus"] != corpus.hash:
        raise ValueError(
            f"the checkpoint read the documents {stream['corpus']}, and its configuration now gives {corpus.hash}: "
            "they have changed since"
        )
    read = documents_read(place)
    states = [LaneState.from_json(values) for values in place["lanes"].values()]
    tokens = [sum(state.out[d] for state in states) for d in range(len(corpus.domains))]
    whole = tokens_of_stages(place)
    domains = {
        name: dict(
            documents=(total := sum(map(sum, read[corpus.hash][name]))),
            of=size,
            passes=round(total / size, 4),
            tokens=tokens[d],
            run_tokens=whole[name],
            share=round(tokens[d] / max(sum(tokens), 1), 4),
            wanted=stream["shares"][name],
        )
        for d, (name, size) in enumerate(zip(corpus.domains, corpus.training_sizes, strict=True))
    }
    others = {hash: {name: sum(map(sum, stages)) for name, stages in of.items()}
              for hash, of in read.items() if hash != corpus.hash}  # fmt: skip
    return dict(tokens_seen=place["tokens_seen"], lanes=len(states), domains=domains, earlier=others)


def _print(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.contents import printable

    print(f"{facts['run']}, step {facts['step']}: {facts['tokens_seen']:,} labels seen, {facts['lanes']} lanes")
    table = Table("domain", box=box.SIMPLE_HEAD)
    for column in ("documents read", "of", "passes", "tokens in the run", "in this stage", "share", "wanted"):
        table.add_column(column, justify="right")
    for name, d in facts["domains"].items():
        counts = (f"{d['documents']:,}", f"{d['of']:,}", f"{d['passes']:.2f}", f"{d['run_tokens']:,}",
                  f"{d['tokens']:,}")  # fmt: skip
        table.add_row(Text(printable(name)), *counts, f"{d['share']:.2%}", f"{d['wanted']:.2%}")
    Console(highlight=False).print(table)
    for corpus, domains in facts["earlier"].items():
        print(f"before, of the documents {corpus}: {', '.join(f'{n:,} of {name}' for name, n in domains.items())}")
