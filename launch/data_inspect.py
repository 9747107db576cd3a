"""`llama4 data inspect [NAME]`: the documents a run would read, how they are mixed and packed, what a batch holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import configs
from launch import overrides
from training.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from data.batch import Batch
    from data.loader import Corpus

TAKES_OVERRIDES = True
READ_ROWS = 512  # about so many are read for the shares, the fill and the lengths
SHOWN_CHARACTERS = 400
BAR = 40  # characters of the longest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, default="pretrain:tiny")
    parser.add_argument("--step", metavar="K", type=int, default=1, help="the batch of this step (the first); earlier "
                        "ones are read and passed over")  # fmt: skip
    parser.add_argument("--show", metavar="N", type=int, default=0, help="also show the first N rows of that batch")
    parser.add_argument("--json", action="store_true", help="print the description as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from launch.startup import open_corpus

    cfg = overrides.apply(configs.find(args.name), args)
    if not 1 <= args.step <= cfg.train.steps:
        raise ValueError(f"--step must lie between 1 and train.steps ({cfg.train.steps}), not {args.step}")
    corpus = open_corpus(cfg, partial(print, file=sys.stderr))
    # Stages read other rows: each begins where the one before it ended.
    place, start, stream, batches = None, 0, None, iter(())
    while True:
        now, stop = cfg.at(start), cfg.stage_end(start)
        here = corpus if now.data == cfg.data else corpus.of(now.data, partial(print, file=sys.stderr))
        stream = here.train(now.train.batch, now.train.seq_len, _chunk(now), cfg.train.seed, 0, 1, place, bool(start))
        batches = islice(stream, min(args.step - 1, stop) - start, None)
        if args.step <= stop:
            break
        for _ in islice(stream, stop - start):
            pass
        place, start = stream.get_state(), stop
        stream.close()
    facts = describe(now, here, batches, args.show) | dict(step=args.step)
    stream.close()
    print(json.dumps(facts)) if args.json else _print(facts)
    return 0


def describe(cfg: RunConfig, corpus: Corpus, batches: Iterator[Batch], show: int = 0) -> dict[str, Any]:
    """Counts by domain and of the packed rows; the rows of the first batch. The corpus's tokens are estimates (see
    `Corpus`), the rest is exact."""
    import numpy as np

    from data import sources

    first = next(batches)
    read = [first, *islice(batches, -(-READ_ROWS // cfg.train.batch))]
    real = np.concatenate([batch.segment_ids > 0 for batch in read])
    domain = np.concatenate([batch.domain for batch in read])[real]
    parts = zip(corpus.sources, *sources.split(corpus.sources, cfg.data.heldout), strict=True)
    domains = {
        source.name: dict(
            documents=len(source),
            train=len(train),
            heldout=len(heldout),
            bytes=int(source.sizes.sum()),
            tokens=round(corpus.mean_tokens[source.name] * len(train)),
            share=round(corpus.shares[source.name], 4),
            read_share=round(float((domain == d).mean()), 4),
        )
        for d, (source, train, heldout) in enumerate(parts)
    }
    lengths = [n for batch in read for n in _lengths(batch)]
    powers = np.bincount(np.log2(lengths).astype(int)).tolist()
    model = corpus.tokenizer
    return dict(
        domains=domains,
        tokenizer=dict(kind=type(model).__name__, vocab_size=model.vocab_size, hash=model.hash),
        packing=dict(
            seq_len=cfg.train.seq_len,
            chunk=_chunk(cfg),
            rows=len(real),
            fill=round(float(real.mean()), 4),
            learned=round(float(np.mean(np.concatenate([batch.loss_mask for batch in read]))), 4),
            pieces_per_row=round(len(lengths) / len(real), 2),
        ),
        lengths={str(2**power): count for power, count in enumerate(powers) if any(powers[: power + 1])},
        steps_per_epoch=round(corpus.tokens / (cfg.train.batch * cfg.train.seq_len)),
        samples=list(_pieces(first, corpus, show)),
    )  # fmt: skip


def _chunk(cfg: RunConfig) -> int:
    return next(iter(cfg.learners.values())).model.chunk


def _lengths(batch: Batch) -> Iterator[int]:
    """Tokens of each piece of a document in the rows."""
    import numpy as np

    for row in batch.segment_ids:
        yield from np.bincount(row)[1:].tolist()


def _pieces(batch: Batch, corpus: Corpus, rows: int) -> Iterator[dict[str, Any]]:
    """The pieces of the first rows: where they lie, of which document, and their text."""
    import numpy as np

    for row in range(min(rows, len(batch.tokens))):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            (at,) = np.nonzero(batch.segment_ids[row] == segment)
            yield dict(
                row=row, at=int(at[0]), tokens=len(at), learned=int(batch.loss_mask[row, at].sum()),
                domain=corpus.domains[int(batch.domain[row, at[0]])], document=int(batch.document_id[row, at[0]]),
                first_visit=bool(batch.first_visit[row, at[0]]), text=corpus.tokenizer.decode(batch.tokens[row, at]),
            )  # fmt: skip


def printable(text: str) -> str:
    r"""Text from data for a terminal: what could steer it or turn its writing round is shown as \x1b or \u202e."""
    return "".join(c if c in "\n\t" or c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _print(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    table = Table("domain", box=box.SIMPLE_HEAD)
    for name in ("documents", "held out", "MB", "M tokens", "share", "in rows read"):
        table.add_column(name, justify="right")
    for name, d in facts["domains"].items():
        counts = (f"{d['documents']:,}", f"{d['heldout']:,}", f"{d['bytes'] / 1e6:,.1f}", f"{d['tokens'] / 1e6:,.1f}")
        table.add_row(Text(printable(name)), *counts, f"{d['share']:.1%}", f"{d['read_share']:.1%}")
    console.print(table)
    tokenizer, packing = facts["tokenizer"], facts["packing"]
    print(f"tokenizer  {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, sha256 {tokenizer['hash'][:16]}")
    print(
        f"packing    {packing['rows']} rows of {packing['seq_len']} tokens in chunks of {packing['chunk']}: "
        f"{packing['fill']:.1%} full, {packing['learned']:.1%} with a label, {packing['pieces_per_row']} documents or "
        "pieces a row"
    )
    print(f"one epoch  about {facts['steps_per_epoch']:,} steps\n\ntokens of a piece")
    most = max(facts["lengths"].values())
    for shortest, count in facts["lengths"].items():
        bar = "█" * -(-count * BAR // most)
        print(f"{int(shortest):>9,} to {2 * int(shortest) - 1:>9,}  {bar} {count:,}")
    _show(facts, console)


def _show(facts: dict[str, Any], console: Console) -> None:
    """Each piece in a colour of its own, in turns; without a terminal, without colours."""
    from rich.text import Text

    row = None
    for n, piece in enumerate(facts["samples"]):
        if piece["row"] != row:
            row = piece["row"]
            console.print(f"\nstep {facts['step']}, row {row}", style="bold")
        visit = "" if piece["first_visit"] else ", seen before"
        head = (
            f"--- {printable(piece['domain'])} {piece['document']}: {piece['tokens']} tokens from {piece['at']}, "
            f"{piece['learned']} learned{visit}"
        )
        text = printable(piece["text"])
        text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
        console.print(Text(head, style="dim"))
        console.print(Text(text, style=("cyan", "yellow")[n % 2]))
