"""`llama4 demo`: the whole way on this machine: train a tiny model, export it, verify it, and let it write.

Run again, it goes on where it was stopped; what is done already is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import configs
from launch import overrides
from launch.train import status, train
from launch.verify import compare

if TYPE_CHECKING:
    from etils import epath

TAKES_OVERRIDES = True
PRESET = "pretrain:tiny"
PROMPTS = ("def main(", "class Queue:\n", "Return the", "Parameters\n----------\n")
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--out DIR] [--FIELD VALUE ...] [--json]"
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="where everything goes (default: runs/demo)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON; the log goes to stderr")
    parser.epilog = f"It trains the preset {PRESET}, on the text that comes with the installed packages."


def run(args: argparse.Namespace) -> int:
    from etils import epath

    cfg = dataclasses.replace(overrides.apply(configs.find(PRESET), args), out=args.out)
    folder = epath.Path(args.out)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        print(f"\n1. Train {PRESET}, {cfg.train.steps} steps")
        summary = train(cfg)
        if not summary["complete"]:
            return status(summary)
        made = Made(folder / "demo.json", summary["step"])
        print("\n2. Export to Hugging Face's format")
        exported = made.stage("export", lambda: _export(folder / f"hf-{summary['step']}", folder))
        print(f"{exported['folder']}: {exported['bytes'] / 1e6:.1f} MB")
        print("\n3. Verify the export against transformers")
        verified = _verify(made, exported["folder"])
        print("\n4. Continue a few prompts")
        samples = made.stage("samples", lambda: _sample(folder))
        print(*(f"\n--- {prompt}{text}" for prompt, text in samples.items()), sep="\n")
        _print_table(summary, exported, verified)
    if args.json:
        print(json.dumps(dict(training=summary, export=exported, verification=verified, samples=samples)))
    return 0 if verified is None or verified["ok"] else 1


class Made:
    """Results of the stages for the weights of one step, in a JSON file; those of another step do not count."""

    def __init__(self, file: epath.Path, step: int):
        stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self._file = file
        self._done: dict[str, Any] = stored if stored.get("step") == step else {"step": step}

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result, from the file if it was done before."""
        if name not in self._done:
            self._done[name] = make()
            self._file.write_text(json.dumps(self._done, indent=2) + "\n")
        return self._done[name]


def _export(to: epath.Path, folder: epath.Path) -> dict[str, Any]:
    from launch.startup import run_tokenizer
    from training.checkpoint import restore_params
    from training.export import save_hf

    if not to.exists():  # else it is whole, and only its record was lost
        weights = restore_params(folder)
        model = weights.config.learners[weights.learner].model
        save_hf(weights.params, model, to, dtype="float32", tokenizer=run_tokenizer(folder, weights.config))
    return dict(folder=str(to), bytes=sum(file.stat().length for file in to.iterdir()), dtype="float32")


def _verify(made: Made, folder: str) -> dict[str, Any] | None:
    """The comparison, or None where transformers is not installed."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        print(f"skipped, without {' and '.join(missing)}: pip install -e '.[verify]' and run llama4 demo again")
        return None
    verified = made.stage("verify", lambda: compare(folder))
    print(verified["text"])
    return verified


def _sample(folder: epath.Path) -> dict[str, str]:
    """Continuations by prompt, at the temperature and top-p published with Llama 4."""
    import jax
    from flax import nnx

    from launch.startup import run_tokenizer
    from llama4_jax.generate import generate
    from training.checkpoint import restore_params
    from training.state import graphdef

    weights = restore_params(folder)
    tokenizer = run_tokenizer(folder, weights.config)
    model = nnx.merge(graphdef(weights.config.learners[weights.learner]), weights.params)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    new = generate(model, prompts, NEW_TOKENS, key=jax.random.key(0), eos_ids=(tokenizer.eos_id,))
    return {prompt: tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, new, strict=True)}


def _print_table(summary: dict[str, Any], exported: dict[str, Any], verified: dict[str, Any] | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    folder, metrics = summary["folder"], summary["metrics"]
    held_out = ", ".join(f"{k.removeprefix('eval/')} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/"))
    table = Table("made", "where", "result", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row("checkpoint", f"{folder}/checkpoints/{summary['step']}", f"held out: {held_out} nats a token")
    table.add_row("metrics", f"{folder}/metrics.jsonl", "a line a step, with tensorboard/ beside it")
    table.add_row("export", exported["folder"], f"{exported['bytes'] / 1e6:.1f} MB, {exported['dtype']}")
    table.add_row("verification", f"{folder}/demo.json", "skipped" if verified is None else verified["text"])
    table.add_row("samples", f"{folder}/demo.json", f"{len(PROMPTS)} continuations of {NEW_TOKENS} tokens")
    Console(highlight=False).print("", table)
