"""`llama4 report RUN...`: one HTML file about a run, or about several side by side."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; others are compared with the first")
    parser.add_argument("--out", metavar="FILE.html", default="", help="default: report.html in the first run's folder")
    parser.add_argument("--figure", metavar="FILE.png", help="also draw the losses alone, as one picture")


def run(args: argparse.Namespace) -> int:
    from etils import epath

    from training import report

    for file in filter(None, (args.out, args.figure)):
        if not epath.Path(file).parent.is_dir():
            raise FileNotFoundError(f"no folder {epath.Path(file).parent} to write {epath.Path(file).name} into")
    print(report.write(args.runs, args.out))
    if args.figure:
        epath.Path(args.figure).write_bytes(report.figure(report.load(args.runs)))
        print(args.figure)
    return 0
