"""`llama4 export RUN --to DIR`: a run's weights and tokenizer as a folder that transformers loads."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder, in Hugging Face's format")
    parser.add_argument("--learner", help="which model, where the run has several")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from launch.startup import run_tokenizer
    from training.checkpoint import restore_params
    from training.export import save_hf

    weights = restore_params(args.run, args.learner, args.step)
    tokenizer = run_tokenizer(args.run, weights.config)
    model = weights.config.learners[weights.learner].model
    save_hf(weights.params, model, args.to, dtype=args.dtype, tokenizer=tokenizer)
    written = dict(folder=args.to, run=args.run, learner=weights.learner, step=weights.step, dtype=args.dtype)
    line = f"{args.to}: {weights.learner} of {args.run} at step {weights.step}, in {args.dtype}"
    print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(written))
    return 0
