"""`llama4 verify DIR`: whether a Hugging Face folder means the same to this project and to another implementation."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from typing import Any, Literal

Against = Literal["transformers", "numpy"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder in Hugging Face's format")
    parser.add_argument("--against", choices=("transformers", "numpy"), default="transformers",
                        help="what to compare with; numpy is a small oracle that needs no extra")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of max |a - b| / max |b| (default: 1e-4)")
    parser.add_argument("--tokens", type=int, help="length of the random sequences (default: 3.5 chunks, at most 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where the logits agree, 1 where they do not or the comparison is undecided."""
    result = compare(args.folder, args.against, args.tolerance, args.tokens, args.seed)
    print(json.dumps(result) if args.json else f"{args.folder}: {result['text']}")
    return 0 if result["ok"] else 1


def compare(
    folder: str, against: Against = "transformers", tolerance: float = 1e-4, tokens: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The comparison of `training.verify.verify` as JSON has it, without transformers' progress bars and advice."""
    from training.verify import verify

    if against == "transformers" and importlib.util.find_spec("transformers"):
        from transformers.utils import logging  # pyright: ignore[reportMissingImports]

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    result = verify(folder, tolerance, tokens, against=against, seed=seed)
    return dataclasses.asdict(result) | dict(ok=result.ok, undecided=result.undecided, text=str(result))
