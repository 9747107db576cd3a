"""`llama4 status RUN`: how far a run is, from whatever machine sees its folder."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--restart", action="store_true",
                        help="say whether the job should be started again: exit status 0 if so, else 1")  # fmt: skip
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    return 1
