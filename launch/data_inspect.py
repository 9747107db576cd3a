"""`llama4 data inspect [NAME]`: the documents a run reads, how they are mixed, and what its batches then hold."""

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
    from rich.text import Text

    from data.loader import Corpus

TAKES_OVERRIDES = True
COUNTED_TOKENS = 2**20  # of the batches that are counted unless --batches says how many
SHOWN, SHOWN_CHARACTERS = 8, 400
BAR = 40  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    overrides.add_name(parser, default="pretrain:tiny")
    parser.add_argument("--at", metavar="STEP", type=int, default=0, help="of a run in stages: the one after this step")
    parser.add_argument("--step", metavar="K", type=int, default=1,
                        help="begin with the batch of this step (default: 1); reads up to there")  # fmt: skip
    parser.add_argument("--batches", metavar="N", type=int,
                        help="how many are counted (default: about a million tokens)")  # fmt: skip
    parser.add_argument("--show", metavar="N", type=int, default=SHOWN,
                        help=f"show the first N pieces of documents (default: {SHOWN})")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from launch.startup import open_corpus
    from training.start import stage_corpus

    cfg = overrides.apply(configs.find(args.name), args)
    _check(args, cfg)
    corpus = open_corpus(cfg, log := partial(print, file=sys.stderr))
    then = cfg.at(args.at)
    facts = describe(then, stage_corpus(cfg, then, corpus, log), args.step, args.batches, args.show)
    print(json.dumps(facts)) if args.json else _print(facts)
    return 0


def _check(args: argparse.Namespace, cfg: RunConfig) -> None:
    for option, least in (("step", 1), ("batches", 1), ("show", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option} must be at least {least}, not {value}")
    if args.step > 1 and args.at:
        raise ValueError("--step counts from the first step of a run, --at begins with a stage: give one of them")
    if args.step > (last := cfg.stage_end(0)):
        what = "the run's last step" if last == cfg.train.steps else "the first stage (--at shows later ones)"
        raise ValueError(f"--step {args.step} lies behind {what}: give at most {last}")


def describe(
    cfg: RunConfig, corpus: Corpus, step: int = 1, batches: int | None = None, show: int = 0
) -> dict[str, Any]:
    """Counts by domain, and of the batches from `step` on. The corpus's tokens are estimates (see `Corpus`); the rest
    is exact."""
    from data.contents import Counts, pieces

    parts = zip(corpus.sources, corpus.training_sizes, corpus.heldout_sizes, strict=True)
    domains = {
        source.name: dict(
            documents=len(source),
            train=train,
            heldout=heldout,
            bytes=int(source.sizes.sum()),
            tokens=round(corpus.pass_tokens[source.name]),
            share=round(corpus.shares[source.name], 4),
        )
        for source, train, heldout in parts
    }
    a_step = cfg.train.batch * cfg.train.seq_len
    counts, shown = Counts(corpus.domains, corpus.shares), []
    chunk = next(iter(cfg.learners.values())).model.chunk
    stream = corpus.train(cfg.train.batch, cfg.train.seq_len, chunk, cfg.train.seed)
    for batch in islice(stream, step - 1, step - 1 + (batches or -(-COUNTED_TOKENS // a_step))):
        counts.add(batch)
        if len(shown) < show:
            here = dict(step=step - 1 + counts.batches)
            found = islice(pieces(batch, corpus.tokenizer, corpus.domains), show - len(shown))
            shown += [here | piece._asdict() for piece in found]
    model, counted = corpus.tokenizer, counts.facts()
    return dict(
        domains=domains,
        tokenizer=dict(kind=type(model).__name__, vocab_size=model.vocab_size, hash=model.hash),
        packing=dict(
            seq_len=cfg.train.seq_len, chunk=chunk, fill=counted["fill"], pieces_per_row=counted["pieces_per_row"]
        ),
        steps_per_epoch=round(corpus.tokens / a_step),
        batches=dict(step=step, **counted),
        samples=shown,
    )


def _print(facts: dict[str, Any]) -> None:
    """Names and texts are the data's: they go through `printable`, and never through rich's markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.contents import printable

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    table = Table("domain", box=box.SIMPLE_HEAD)
    for name in ("documents", "train", "held out", "bytes", "tokens", "target share", "share read"):
        table.add_column(name, justify="right")
    batches = facts["batches"]
    for name, d in facts["domains"].items():
        counts = (d["documents"], d["train"], d["heldout"], d["bytes"], d["tokens"])
        shares = (d["share"], batches["mixture"][name]["read"])
        cells = [*(f"{count:,}" for count in counts), *(f"{share:.1%}" for share in shares)]
        table.add_row(Text(printable(name)), *cells)
    console.print(table)
    tokenizer, packing = facts["tokenizer"], facts["packing"]
    first, last = batches["step"], batches["step"] + batches["batches"] - 1
    for line in (
        f"tokenizer  {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, sha256 {tokenizer['hash'][:16]}",
        f"one epoch  about {facts['steps_per_epoch']:,} steps",
        f"read       the batches of steps {first:,} to {last:,}: {batches['rows']:,} rows, "
        f"{batches['tokens']:,} tokens, {batches['counted']:,} of them counted in the loss",
        f"packing    rows of {packing['seq_len']} tokens in chunks of {packing['chunk']}: {packing['fill']:.1%} full, "
        f"{packing['pieces_per_row']} documents or pieces a row",
        "",
        "tokens     documents, or pieces of those that are longer than a row",
        *_bars(batches["lengths"]),
    ):
        console.print(line)
    if facts["samples"]:
        how = "dim" if console.color_system else "in ⟦⟧"
        console.print(f"\nBelow, what is read but not predicted for the loss stands {how}.")
    for sample in facts["samples"]:
        console.print(_piece(sample, plain=console.color_system is None))


def _bars(lengths: list[list[int]]) -> Iterator[str]:
    """A line a bin: its largest length, a bar, the number of pieces."""
    most = max((count for _, count in lengths), default=1)
    for bound, count in lengths:
        yield f"{f'≤ {bound:,}':>10} {'█' * -(-count * BAR // most)} {count:,}"


def _piece(sample: dict[str, Any], plain: bool) -> Text:
    """A heading and, each line set in so that no text can pass for a heading, what the piece says."""
    from rich.text import Text

    from data.contents import printable

    goes_on = ("" if sample["begins"] else ", goes on from before") + ("" if sample["ends"] else ", goes on after")
    heading = (
        f"\n--- step {sample['step']}, row {sample['row']}, place {sample['at']}: {printable(sample['domain'])} "
        f"{sample['document']}, {sample['tokens']:,} tokens, {sample['counted']:,} counted{goes_on}\n"
    )
    body, left = Text(), SHOWN_CHARACTERS
    body.append("bos " * sample["begins"], style="green")
    for span, counted, _ in sample["spans"]:
        shown, left = printable(span[:left]), max(0, left - len(span))
        if shown:
            body.append(shown if counted or not plain else f"⟦{shown}⟧", style="" if counted else "dim")
    cut = len(sample["text"]) > SHOWN_CHARACTERS
    body.append(" ..." if cut else " eos" * sample["ends"], style="" if cut else "green")
    lines = Text("\n").join(Text("  ").append_text(line) for line in body.split("\n"))
    return Text().append(heading, style="bold cyan").append_text(lines)
