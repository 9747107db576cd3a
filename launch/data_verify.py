"""`llama4 data verify DIR`: whether converted shards are still what was written, by the hashes in their manifest."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder that llama4 data convert made")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where all is as it was written, 1 where a file is damaged."""
    from data.verify import verify
    from launch.startup import progress

    with progress() as log:
        facts = verify(args.folder, log=log)
    if args.json:
        print(json.dumps(facts))
        return 1 if facts["damaged"] else 0
    for found in facts["damaged"]:
        print(f"{found['file']} {found['why']}")
    what = f"{facts['shards']} shards, {facts['documents']:,} documents, {facts['bytes'] / 1e6:,.1f} MB"
    if facts["damaged"]:
        print(f"{args.folder}: {len(facts['damaged'])} damaged files of {what}. Remove them, and the command that "
              "converted the folder writes them anew")  # fmt: skip
        return 1
    unhashed = f" ({facts['unhashed']} have no hash in the manifest)" if facts["unhashed"] else ""
    print(f"{args.folder}: as written: {what}{unhashed}")
    return 0
