"""A run that is quick on several processes, and the launchers' real ways to start it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from support import ROOT

SIZE = ("--model.embed-dim 32 --model.num-layers 4 --model.num-heads 2 --model.num-kv-heads 1 --model.head-dim 8 "
        "--model.expert-dim 32 --model.dense-dim 32 --model.chunk 64 --data.vocab-size 352 --train.batch 8 "
        "--train.seq-len 64 --train.log-every 1 --train.eval-every 1000 --train.eval-batches 1")  # fmt: skip
QUICK = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
         "--xla_cpu_use_fusion_emitters=false")  # fmt: skip


def options(folder: Path, steps: int = 20) -> list[str]:
    """Of `llama4 train pretrain:tiny`: a small model on a few made-up documents in `folder`."""
    text = folder / "text.jsonl"
    if not text.exists():
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(300)]
        lines = (json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(400))
        text.write_text("".join(f"{line}\n" for line in lines))
    return [*SIZE.split(), "--data.sources", f"t={text}", "--train.steps", str(steps)]


def program(folder: Path) -> Path:
    """A command `llama4` that runs this checkout, wherever it is started."""
    file = folder / "llama4"
    if not file.exists():
        file.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m launch.cli "$@"\n')
        file.chmod(0o755)
    return file


def losses(folder: Path) -> list[float]:
    """Of every step, each once and in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]
