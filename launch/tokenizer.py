"""`llama4 tokenizer train|encode|decode|info`: makes a tokenizer from a corpus, and shows what one does."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING

from data.config import DataConfig
from launch import overrides

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="{train,encode,decode,info}")
    train = actions.add_parser("train", help="train a BPE on the documents that a run would read")
    train.add_argument("--to", metavar="DIR", required=True, help="the folder to write tokenizer.model into")
    default = DataConfig()
    sources = "where documents are, by domain, as for a run (default: the embedded corpora)"
    train.add_argument("--data.sources", dest="sources", metavar="NAME=PLACE", nargs="+", help=sources)
    train.add_argument(
        "--data.vocab-size", "--data.vocab_size", dest="vocab_size", metavar="N", type=int, default=default.vocab_size,
        help=f"tokens of the vocabulary (default: {default.vocab_size})",
    )  # fmt: skip
    encode = actions.add_parser("encode", help="text to token ids")
    encode.add_argument("words", metavar="TEXT", nargs="*", help="default: standard input")
    decode = actions.add_parser("decode", help="token ids to text")
    decode.add_argument("words", metavar="ID", nargs="*", help="default: standard input")
    info = actions.add_parser("info", help="size, special ids and hash")
    for action in (encode, decode, info):
        path = "its file, or a folder that holds one (an export, a run), or llama4: the installed llama-models'"
        action.add_argument("--tokenizer", metavar="PATH", required=True, help=path)
    for action in (train, encode, decode, info):
        action.add_argument("--json", action="store_true", help="print the result as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    from data import tokenizer

    if args.action == "train":
        return _train(args)
    model = tokenizer.load(args.tokenizer)
    if args.action == "info":
        _print_info(args, model)
    elif args.action == "encode":
        ids = model.encode(" ".join(args.words) if args.words else sys.stdin.read())
        print(json.dumps(ids) if args.json else " ".join(map(str, ids)))
    else:
        text = model.decode(_ids(args.words or sys.stdin.read().split(), model.vocab_size))
        print(json.dumps(text) if args.json else text)
    return 0


def _train(args: argparse.Namespace) -> int:
    from data.loader import Corpus
    from launch.startup import cache_folder

    places = overrides.named("--data.sources", args.sources) if args.sources else {}
    cfg = DataConfig(sources=places, vocab_size=args.vocab_size)
    corpus = Corpus.open(cfg, cache_folder(), partial(print, file=sys.stderr))
    corpus.tokenizer.save(args.to)
    _print_info(args, corpus.tokenizer)
    return 0


def _print_info(args: argparse.Namespace, model: Tokenizer) -> None:
    names = ("vocab_size", "bos_id", "eos_id", "pad_id", "hash")
    info = {"kind": type(model).__name__, **{name: getattr(model, name) for name in names}}
    print(json.dumps(info) if args.json else "\n".join(f"{name:12}{value}" for name, value in info.items()))


def _ids(words: list[str], vocab_size: int) -> list[int]:
    for word in words:
        if not word.isdecimal() or int(word) >= vocab_size:
            raise ValueError(f"{word!r} is no token id: they are whole numbers below {vocab_size}")
    return [int(word) for word in words]
