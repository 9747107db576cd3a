"""Pretraining: one learner, next-token prediction. A new experiment is a new function, not a new flag."""

from __future__ import annotations

from dataclasses import replace

from data.config import DataConfig
from llama4_jax.config import ModelConfig, tiny_behemoth, tiny_scout
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, Schedule, Stage, TrainConfig

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


def tiny_long() -> RunConfig:
    """A tiny Scout on rows of 512 tokens, then on rows of 2,048, at a rate that goes on falling.

    The shape of a long-context run: most tokens in short rows, the last ones in long rows, as many a step; a second
    stage with a mesh of its own (where there are devices, --stages.0.mesh.context 4) and a small learning rate.

    Command:  llama4 train pretrain:tiny_long
    Hardware: 2 CPU cores, two minutes
    Result:   held out, TODO nats a token in rows of 512 after step 100, TODO in rows of 2,048 at the end
    """
    long = Stage(after=100, batch=2, seq_len=2048, mesh=MeshConfig(), schedule=Schedule(peak=0.1, decay=1.0))
    train = replace(TRAIN, steps=125, seq_len=512)
    return replace(tiny(), name="pretrain:tiny_long", train=train, stages=(long,))


PRESETS = (tiny, tiny_behemoth_teacher, tiny_long)
