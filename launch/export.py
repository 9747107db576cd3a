"""`llama4 export RUN --to DIR`: a run's weights and tokenizer as a folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.checkpoint_arrays import Arrays

QUANTISED = ("int4-g32", "int4-g128", "int8", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder, in Hugging Face's format")
    parser.add_argument("--learner", help="which model, where the run has several")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of what is not quantised; float32 keeps the masters (default: bfloat16)")  # fmt: skip
    parser.add_argument("--quantise", choices=QUANTISED, metavar="SCHEME",
                        help=f"weights of projections and experts in fewer bits: {', '.join(QUANTISED)}")  # fmt: skip
    parser.add_argument("--max-memory", default="2GB", help="of this process, whatever the model (default: 2GB)")
    parser.add_argument("--threads", type=int, default=4, help="default: 4")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON; the log goes to stderr")
    parser.epilog = "Stopped or killed, the same command goes on where it was (docs/export.md)."


def run(args: argparse.Namespace) -> int:
    if args.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {args.threads}")
    arrays = write(
        args.run, args.to, args.learner, args.step, args.dtype, args.quantise, args.max_memory, args.threads
    )  # fmt: skip
    written = dict(folder=args.to, run=args.run, learner=arrays.learner, step=arrays.step, dtype=args.dtype)
    written |= dict(quantised=args.quantise) if args.quantise else {}
    how = f"{args.quantise}, the rest {args.dtype}" if args.quantise else args.dtype
    line = f"{args.to}: {arrays.learner} of {args.run} at step {arrays.step}, in {how}"
    print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(written))
    return 0


def write(
    run: str, to: str, learner: str | None, step: int | None, dtype: Any, quantise: str | None, max_memory: str,
    threads: int = 4,
) -> Arrays:  # fmt: skip
    """Export a run's checkpoint with its tokenizer and card."""
    from training import model_card, quantised
    from training.checkpoint_arrays import Arrays
    from training.export import export_run
    from training.load import run_tokenizer
    from training.model_folder import About
    from training.transfer import parse_bytes

    limit = parse_bytes(max_memory)
    arrays = Arrays(run, learner, step)
    tokenizer = run_tokenizer(run, arrays.config)
    about = About(tokenizer, model_card.card(arrays, tokenizer, dtype, quantise or ""))
    scheme = quantised.SCHEMES[quantise] if quantise else None
    export_run(arrays, to, dtype=dtype, quant=scheme, about=about, max_memory=limit, threads=threads)
    return arrays
