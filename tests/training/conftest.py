"""What the tests of a whole run share: a corpus of two domains, and a run that takes a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig
from data.loader import Corpus
from llama4_jax.config import tiny_maverick
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig

WORDS = ["a", "of", "the", "run", "step", "loss", "model", "layer", "token", "expert", "router", "chunk", "heads"]
VOCAB = 320


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of two domains, as JSONL."""
    file, rng = tmp_path_factory.mktemp("corpus") / "documents.jsonl", random.Random(0)
    texts = [" ".join(rng.choices(WORDS[d::2], k=rng.randint(5, 60))) for _ in range(100) for d in (0, 1)]
    lines = [json.dumps(dict(text=text, domain=("even", "odd")[i % 2])) for i, text in enumerate(texts)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def corpus(documents: Path) -> Corpus:
    """Those documents, with a tokenizer trained on them."""
    cfg = DataConfig(sources={"text": str(documents)}, vocab_size=VOCAB, heldout=0.1)
    return Corpus.open(cfg, documents.parent / "cache", log=lambda _: None)


@pytest.fixture(scope="session")
def run_config() -> Callable[..., RunConfig]:
    """A run in a folder of a tiny Maverick (dense and MoE layers, two blocks), with changes to its train section."""

    def make(out: Path, mesh: MeshConfig | None = None, **train: int) -> RunConfig:
        model = replace(
            tiny_maverick(), vocab_size=VOCAB, embed_dim=32, num_layers=4, nope_every=2, num_heads=2, num_kv_heads=2,
            head_dim=8, dense_dim=32, expert_dim=16, num_experts=4, chunk=16, floor_scale=8,
        )  # fmt: skip
        learner = Learner(model, OptimizerConfig(learning_rate=1e-2, warmup=2), compute_dtype="float32", remat="none")
        portions = dict(steps=8, batch=8, seq_len=32, log_every=1, eval_every=4, eval_batches=2, checkpoint_every=4)
        train_cfg = TrainConfig(**portions | train)
        return RunConfig("test", {"scout": learner}, mesh=mesh or MeshConfig(), train=train_cfg, out=str(out))

    return make


@pytest.fixture
def make_run(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """`run_config` in a folder of the test's own."""

    def make(out: str = "run", **changes) -> RunConfig:
        return run_config(tmp_path / out, **changes)

    return make
