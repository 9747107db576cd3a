"""Pretraining: one learner, next-token prediction. A new experiment is a new function, not a new flag."""

from __future__ import annotations

from dataclasses import replace

from configs import full
from data.config import DataConfig
from llama4_jax.config import ModelConfig, behemoth, maverick, scout, tiny_behemoth, tiny_scout
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig

DATA = DataConfig(vocab_size=2048)
TRAIN = TrainConfig(steps=250, batch=8, seq_len=256, eval_every=50)


def tiny_learner(model: ModelConfig) -> Learner:
    """How a tiny model learns on a CPU, where fp32 is faster than bf16 and memory is plenty."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup=50)
    return Learner(model, optimizer, compute_dtype="float32", remat="none")


def tiny() -> RunConfig:
    """A tiny Scout on the embedded text.

    Command:  llama4 train pretrain:tiny
    Hardware: 2 CPU cores, a minute
    Result:   held out, 4.41 nats a token
    """
    return RunConfig("pretrain:tiny", {"scout": tiny_learner(tiny_scout())}, DATA, train=TRAIN)


def tiny_behemoth_teacher() -> RunConfig:
    """A tiny Behemoth on the embedded text, to teach others.

    Command:  llama4 train pretrain:tiny_behemoth_teacher
    Hardware: 2 CPU cores, three minutes
    Result:   held out, 3.89 nats a token
    """
    train = replace(TRAIN, steps=500, seed=1)  # its own order of the documents
    return RunConfig(
        "pretrain:tiny_behemoth_teacher", {"behemoth": tiny_learner(tiny_behemoth())}, DATA, train=train
    )  # fmt: skip


# --- Full size: never run; docs/plans/ says what is known of each


def scout_8k() -> RunConfig:
    """Scout, rows of 8,192 tokens, 8.4M tokens a step (untuned).

    Command:  llama4 train pretrain:scout_8k --data.jsonl DIR --data.tokenizer tokenizer.model
    Hardware: 128 v5p (v5p:4x4x8)
    Result:   never run; llama4 plan pretrain:scout_8k --topology v5p:4x4x8
    """
    learner = full.learner("scout", scout(), microbatches=4)
    return full.run("pretrain:scout_8k", {"scout": learner}, full.TOKENS["scout"], 1024, 8192, MeshConfig())


def scout_256k() -> RunConfig:
    """Scout's long-context stage: rows of 262,144 tokens, 2.1M tokens a step (untuned), from the first stage's end.

    Command:  llama4 train pretrain:scout_256k --from runs/pretrain-scout_8k --data.jsonl DIR --data.tokenizer F
    Hardware: 256 v5p (v5p:4x8x8)
    Result:   never run; llama4 plan pretrain:scout_256k --topology v5p:4x8x8
    """
    learner = full.long_rate(full.learner("scout", scout()))
    mesh = MeshConfig(context=32)
    return full.run("pretrain:scout_256k", {"scout": learner}, full.LONG_TOKENS, 8, full.LONG, mesh)


def maverick_8k() -> RunConfig:
    """Maverick, rows of 8,192 tokens, 8.4M tokens a step (untuned).

    Command:  llama4 train pretrain:maverick_8k --data.jsonl DIR --data.tokenizer tokenizer.model
    Hardware: 512 v5p (v5p:8x8x8)
    Result:   never run; llama4 plan pretrain:maverick_8k --topology v5p:8x8x8
    """
    learner = full.learner("maverick", maverick(), microbatches=2, **full.EXPERTS_TRAVEL)
    mesh = MeshConfig(expert=32)
    return full.run("pretrain:maverick_8k", {"maverick": learner}, full.TOKENS["maverick"], 1024, 8192, mesh)


def maverick_256k() -> RunConfig:
    """Maverick's long-context stage: rows of 262,144 tokens, 4.2M tokens a step (untuned), from the first one's end.

    Command:  llama4 train pretrain:maverick_256k --from runs/pretrain-maverick_8k --data.jsonl DIR --data.tokenizer F
    Hardware: 512 v5p (v5p:8x8x8)
    Result:   never run; llama4 plan pretrain:maverick_256k --topology v5p:8x8x8
    """
    learner = full.long_rate(full.learner("maverick", maverick(), **full.EXPERTS_TRAVEL))
    mesh = MeshConfig(expert=16, context=32)
    return full.run("pretrain:maverick_256k", {"maverick": learner}, full.LONG_TOKENS, 16, full.LONG, mesh)


def behemoth_8k() -> RunConfig:
    """Behemoth, rows of 8,192 tokens, 16.8M tokens a step (untuned).

    Command:  llama4 train pretrain:behemoth_8k --data.jsonl DIR --data.tokenizer tokenizer.model
    Hardware: 2,048 v5p (v5p:8x16x16)
    Result:   never run; llama4 plan pretrain:behemoth_8k --topology v5p:8x16x16
    """
    learner = full.learner("behemoth", behemoth(), **full.EXPERTS_TRAVEL)
    mesh = MeshConfig(expert=16)
    return full.run("pretrain:behemoth_8k", {"behemoth": learner}, full.TOKENS["behemoth"], 2048, 8192, mesh)


PRESETS = (tiny, tiny_behemoth_teacher, scout_8k, scout_256k, maverick_8k, maverick_256k, behemoth_8k)
