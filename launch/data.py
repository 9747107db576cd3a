"""`llama4 data [NAME]`: the documents a run would read, how they are mixed, and how well they pack."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import configs
from launch import overrides
from training.config import RunConfig

if TYPE_CHECKING:
    from data.loader import Corpus

TAKES_OVERRIDES = True
PACKED_ROWS = 512  # on which the fill is measured, after as many: the first rows to close are the fullest
SHOWN_CHARACTERS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, default="pretrain:tiny")
    parser.add_argument("--at", metavar="STEP", type=int, default=0, help="of a run in stages: the one after this step")
    parser.add_argument("--show", metavar="N", type=int, default=0, help="also show the first N pieces of documents")
    parser.add_argument("--json", action="store_true", help="print the description as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from launch.startup import open_corpus

    cfg = overrides.apply(configs.find(args.name), args)
    corpus = open_corpus(cfg, log := partial(print, file=sys.stderr))
    if (then := cfg.at(args.at)).data != cfg.data:
        corpus = corpus.of(then.data, log)
    cfg = then
    facts = describe(cfg, corpus)
    if args.show:
        facts["samples"] = list(islice(_pieces(cfg, corpus), args.show))
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def describe(cfg: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Counts by domain and of the packed rows. Tokens are estimates (see `Corpus`), the rest is exact."""
    import numpy as np

    from data import sources

    parts = zip(corpus.sources, *sources.split(corpus.sources, cfg.data.heldout), strict=True)
    domains = {
        source.name: dict(
            documents=len(source),
            train=len(train),
            heldout=len(heldout),
            bytes=int(source.sizes.sum()),
            tokens=round(corpus.mean_tokens[source.name] * len(train)),
            share=round(corpus.shares[source.name], 4),
        )
        for source, train, heldout in parts
    }
    rows = next(islice(_batches(cfg, corpus, PACKED_ROWS), 1, None))
    model = corpus.tokenizer
    return dict(
        domains=domains,
        tokenizer=dict(kind=type(model).__name__, vocab_size=model.vocab_size, hash=model.hash),
        packing=dict(
            seq_len=cfg.train.seq_len,
            chunk=_chunk(cfg),
            fill=round(float(np.mean(rows.segment_ids > 0)), 4),
            pieces_per_row=round(float(np.mean(rows.segment_ids.max(axis=1))), 2),
        ),
        steps_per_epoch=round(corpus.tokens / (cfg.train.batch * cfg.train.seq_len)),
    )


def _chunk(cfg: RunConfig) -> int:
    return next(iter(cfg.learners.values())).model.chunk


def _batches(cfg: RunConfig, corpus: Corpus, rows: int):
    return corpus.train(rows, cfg.train.seq_len, _chunk(cfg), cfg.train.seed)


def _pieces(cfg: RunConfig, corpus: Corpus):
    """Pieces of documents in the order in which the run trains on them."""
    for batch in _batches(cfg, corpus, 1):
        for segment in range(1, int(batch.segment_ids.max()) + 1):
            inside = batch.segment_ids == segment
            text = corpus.tokenizer.decode(batch.tokens[inside])
            yield dict(
                domain=corpus.domains[int(batch.domain[inside][0])],
                document=int(batch.document_id[inside][0]),
                tokens=int(inside.sum()),
                text=text,
            )


def _print(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("domain", box=box.SIMPLE_HEAD)
    columns = ("documents", "train", "held out", "bytes", "tokens", "share of tokens")
    for name in columns:
        table.add_column(name, justify="right")
    for name, d in facts["domains"].items():
        counts = (d["documents"], d["train"], d["heldout"], d["bytes"], d["tokens"])
        table.add_row(name, *(f"{count:,}" for count in counts), f"{d['share']:.1%}")
    console.print(table)
    tokenizer, packing = facts["tokenizer"], facts["packing"]
    print(f"tokenizer  {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, sha256 {tokenizer['hash'][:16]}")
    print(
        f"packing    rows of {packing['seq_len']} tokens in chunks of {packing['chunk']}: {packing['fill']:.1%} full, "
        f"{packing['pieces_per_row']} documents or pieces a row"
    )
    print(f"one epoch  about {facts['steps_per_epoch']:,} steps")
    for sample in facts.get("samples", ()):
        print(f"\n--- {sample['domain']} {sample['document']}, {sample['tokens']} tokens")
        text = sample["text"]
        print(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ...")
