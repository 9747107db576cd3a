"""`llama4 data convert IN... --to DIR`: files of text in many formats as ArrayRecord shards, read at random."""

from __future__ import annotations

import argparse
import json
import os
import sys

SHOWN = 3  # skipped records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, plain = parser.add_argument, [".txt", ".md", ".rst"]
    formats = ".jsonl[.gz|.zst], .json.gz, .parquet, .tar[.gz|.zst] (WebDataset), plain text, or folders of them"
    add("inputs", metavar="IN", nargs="+", help=formats)
    add("--to", metavar="DIR", required=True, help="the folder for the shards; the same command goes on after a kill")
    add("--name", default="documents", help="what the shards' names begin with (default: documents)")
    add("--shard-mb", metavar="N", type=int, default=256, help="MiB of text in a shard (default: 256)")
    add("--workers", metavar="N", type=int, help="processes (default: one for each core)")
    add("--text-field", metavar="FIELD", default="", help='where the text is (default: "text", else "content")')
    add("--domain", default="", help='of every document (default: the record\'s own "domain")')
    suffixes = f"files that are one document each (default: {' '.join(plain)})"
    add("--plain", metavar="SUFFIX", nargs="+", default=plain, help=suffixes)
    add("--bad-records", metavar="SHARE", type=float, default=0.001, help="that may be skipped (default: 0.001)")
    add("--again", action="store_true", help="start over where inputs or options changed")
    add("--runner", choices=("local", "beam"), default="local", help="default: local")
    beam = "all that follows is Apache Beam's, as in --runner beam --beam-args --runner=DataflowRunner"
    add("--beam-args", metavar="ARG", nargs=argparse.REMAINDER, help=beam)
    add("--json", action="store_true", help="print the result as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from data.convert import EVERY, convert, describe
    from data.shards import Options
    from launch.startup import progress

    if args.beam_args is not None and args.runner != "beam":
        raise ValueError("--beam-args are for --runner beam")
    options = Options(args.name, args.shard_mb, args.text_field, args.domain, tuple(args.plain))
    beam = (args.beam_args or []) if args.runner == "beam" else None
    workers = os.cpu_count() or 1 if args.workers is None else args.workers
    with progress() as log:
        found, fresh = convert(
            args.inputs, args.to, options, workers=workers, budget=args.bad_records, again=args.again, beam=beam,
            log=log, every=1.0 if sys.stderr.isatty() else EVERY,
        )  # fmt: skip
    shards, skipped, left_out = len(found["shards"]), found["skipped"], found["left_out"]
    facts = dict(folder=args.to, fresh=fresh, shards=shards)
    facts |= {name: found[name] for name in ("documents", "bytes", "skipped", "left_out")}
    out = sys.stderr if args.json else sys.stdout
    done = "" if fresh else "nothing to do, it is all there: "
    print(f"{args.to}: {done}{found['documents']:,} documents, {found['bytes']:,} bytes, {shards} shards", file=out)
    for title, counts in (
        ("skipped records", skipped),
        ("fields left out", left_out["fields"]),
        ("files left out", left_out["files"]),
    ):
        if counts:
            print(f"{title}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}", file=out)
    for example in found["examples"][:SHOWN]:
        print(f"  {describe(example)}", file=out)
    if args.json:
        print(json.dumps(facts))
    return 0
