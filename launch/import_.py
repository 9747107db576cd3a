"""`llama4 import DIR --to RUN`: a Hugging Face folder as a run at step 0, to be trained, exported or evaluated."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys

import configs
from launch import overrides
from training.config import RunConfig

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} DIR --to RUN [--preset NAME] [--FIELD VALUE ...] [--json]"
    parser.add_argument("folder", metavar="DIR", help="a folder in Hugging Face's format")
    parser.add_argument("--to", metavar="RUN", required=True, help="the run's folder")
    parser.add_argument("--preset", metavar="NAME", default="pretrain:tiny",
                        help="where everything but the model comes from (default: pretrain:tiny)")  # fmt: skip
    parser.add_argument("--max-memory", default="2GB", help="of this process, whatever the model (default: 2GB)")
    parser.add_argument("--threads", type=int, default=4, help="default: 4")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON; the log goes to stderr")
    parser.epilog = (
        "The model's shape is the folder's. The tokenizer is the folder's, or --data.tokenizer PATH.\n"
        "The checkpoint holds the weights alone, as they are: llama4 train RUN goes on from there with a fresh\n"
        "optimizer, llama4 export RUN writes them again. Stopped or killed, the same command goes on where it was.\n"
        "llama4 train NAME --init hf:DIR imports and trains in one."
    )


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        cfg = _configuration(args)
        _write(cfg, args)
        print(f"{args.to}: the weights of {args.folder} at step 0; go on with: llama4 train {args.to}")
    if args.json:
        print(json.dumps(dict(folder=args.to, source=args.folder, learner=next(iter(cfg.learners)), step=0)))
    return 0


def _configuration(args: argparse.Namespace) -> RunConfig:
    """The preset with the folder's model, weights and tokenizer."""
    from data import tokenizer
    from training.model_folder import read_config

    cfg = configs.find(args.preset)
    if len(cfg.learners) > 1:
        raise ValueError(f"import makes a run with one learner, but {args.preset} has {', '.join(cfg.learners)}")
    name, learner = next(iter(cfg.learners.items()))
    learner = dataclasses.replace(learner, model=read_config(args.folder), init=f"hf:{args.folder}")
    file = tokenizer.find(args.folder)
    data = dataclasses.replace(cfg.data, tokenizer=str(file or ""))
    cfg = overrides.apply(dataclasses.replace(cfg, learners={name: learner}, data=data, out=args.to), args)
    if not cfg.data.tokenizer:
        raise FileNotFoundError(
            f"no {tokenizer.MODEL_FILE} or {tokenizer.HF_FILE} in {args.folder}: give --data.tokenizer PATH"
        )
    return cfg


def _write(cfg: RunConfig, args: argparse.Namespace) -> None:
    """What `training.loop.train` would have kept before its first step, but for the optimizer's state."""
    from data import tokenizer
    from training.hf_import import import_run
    from training.record import write_config
    from training.transfer import parse_bytes

    overrides.check_vocabulary(cfg)
    tokens = tokenizer.load(cfg.data.tokenizer)
    overrides.check_vocabulary(cfg, tokens.vocab_size)
    # The run needs the source no more.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=f"{cfg.folder}/{tokens.FILE}"))

    def finish(folder):
        write_config(folder, cfg)
        tokens.save(folder)

    import_run(args.folder, cfg, tokens.hash, finish, max_memory=parse_bytes(args.max_memory), threads=args.threads)
