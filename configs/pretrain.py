"""Pretraining: one learner, next-token prediction. A new experiment is a new function, not a new flag."""

from __future__ import annotations

from dataclasses import replace

from configs import full
from data.config import DataConfig
from llama4_jax.config import (
    ModelConfig,
    behemoth,
    maverick,
    scout,
    tiny_behemoth,
    tiny_scout,
    tiny_vision,
    with_vision,
)
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
    Result:   held out, 4.33 nats a token
    """
    return RunConfig("pretrain:tiny", {"scout": tiny_learner(tiny_scout())}, DATA, train=TRAIN)


def with_digits(cfg: RunConfig, name: str) -> RunConfig:
    """A tiny run on text and images in the same rows: every model gets a tower, 20% of the tokens are digits."""
    learners = {n: replace(x, model=with_vision(x.model, tiny_vision())) for n, x in cfg.learners.items()}
    sources = {"code": "embedded:code", "digits": "embedded:digits", "prose": "embedded:prose"}
    data = replace(cfg.data, sources=sources, weights={"digits": 0.2}, heldout=0.05)
    return replace(cfg, name=name, learners=learners, data=data, train=replace(cfg.train, tiles=24))


def tiny_images() -> RunConfig:
    """A tiny Scout on the embedded text and on images of handwritten digits, each followed by its name.

    Command:  llama4 train pretrain:tiny_images
    Hardware: 2 CPU cores, two minutes
    Result:   held out, 4.32 nats a token; names 94 of 100 held-out digits
    """
    return with_digits(tiny(), "pretrain:tiny_images")


def tiny_behemoth_teacher() -> RunConfig:
    """A tiny Behemoth on the embedded text, to teach others.

    Command:  llama4 train pretrain:tiny_behemoth_teacher
    Hardware: 2 CPU cores, three minutes
    Result:   held out, 3.93 nats a token
    """
    train = replace(TRAIN, steps=500, seed=1)  # its own order of the documents
    return RunConfig(
        "pretrain:tiny_behemoth_teacher", {"behemoth": tiny_learner(tiny_behemoth())}, DATA, train=train
    )  # fmt: skip


def tiny_behemoth_images() -> RunConfig:
    """A tiny Behemoth on the embedded text and on images of handwritten digits, to teach others.

    Command:  llama4 train pretrain:tiny_behemoth_images
    Hardware: 2 CPU cores, four minutes
    Result:   held out, 3.85 nats a token; names 99 of 100 held-out digits
    """
    return with_digits(tiny_behemoth_teacher(), "pretrain:tiny_behemoth_images")


def tiny_behemoth_long() -> RunConfig:
    """A tiny Behemoth on ten times the tokens of `tiny`, to teach in experiments (`configs/ablation.py`).

    Command:  llama4 train pretrain:tiny_behemoth_long
    Hardware: 2 CPU cores, half an hour
    Result:   held out, 2.93 nats a token
    """
    train = replace(TRAIN, steps=1250, batch=16, seed=1, eval_every=250, checkpoint_every=250)
    behemoth = tiny_learner(tiny_behemoth())
    return RunConfig("pretrain:tiny_behemoth_long", {"behemoth": behemoth}, DATA, train=train)


def tiny_long() -> RunConfig:
    """A tiny Scout on rows of 512 tokens, then on rows of 2,048, at a rate that goes on falling.

    The shape of a long-context run: most tokens in short rows, the last ones in long rows, as many a step; a second
    stage with a mesh of its own (where there are devices, --stages.0.mesh.context 4) and a small learning rate.

    Command:  llama4 train pretrain:tiny_long
    Hardware: 2 CPU cores, two minutes
    Result:   held out, 4.95 nats a token in rows of 512 after step 100, 4.92 in rows of 2,048 at the end
    """
    long = Stage(after=100, batch=2, seq_len=2048, mesh=MeshConfig(), schedule=Schedule(peak=0.1, decay=1.0))
    train = replace(TRAIN, steps=125, seq_len=512)
    return replace(tiny(), name="pretrain:tiny_long", train=train, stages=(long,))


# --- Full size: never run; docs/plans/ says what is known of each


def scout_8k() -> RunConfig:
    """Scout, rows of 8,192 tokens, 8.4M tokens a step (untuned).

    Command:  llama4 train pretrain:scout_8k --data.sources text=DIR --data.tokenizer tokenizer.model
    Hardware: 128 v5p (v5p:4x4x8)
    Result:   never run; llama4 plan pretrain:scout_8k --topology v5p:4x4x8
    """
    learner = full.learner("scout", scout(), microbatches=4)
    return full.run("pretrain:scout_8k", {"scout": learner}, full.TOKENS["scout"], 1024, 8192, MeshConfig())


def scout_256k() -> RunConfig:
    """Scout's long-context stage, from the end of `scout_8k`: rows of 262,144, 2.1M tokens a step.

    Command:  llama4 train pretrain:scout_256k --from runs/pretrain-scout_8k --data.sources text=DIR --data.tokenizer F
    Hardware: 256 v5p (v5p:4x8x8)
    Result:   never run; llama4 plan pretrain:scout_256k --topology v5p:4x8x8
    """
    learner = full.learner("scout", scout())
    return full.long_run("pretrain:scout_256k", scout_8k(), {"scout": learner}, 8, MeshConfig(context=32))


def scout_images_8k() -> RunConfig:
    """Scout with its vision tower: as `scout_8k`, with room for 16 tiles of images in a row (untuned).

    Command:  llama4 train pretrain:scout_images_8k --data.sources text=DIR pictures=webdataset:DIR --data.tokenizer F
    Hardware: 128 v5p (v5p:4x4x8)
    Result:   never run; llama4 plan pretrain:scout_images_8k --topology v5p:4x4x8
    """
    return with_images(scout_8k(), "pretrain:scout_images_8k", tiles=16)


def scout_images_256k() -> RunConfig:
    """Scout with its vision tower: as `scout_256k`, with room for 256 tiles of images in a row (untuned).

    These are 48 images of 5 tiles (such as 480 x 640 pixels), and some to spare. From the end of `scout_images_8k`.

    Command:  llama4 train pretrain:scout_images_256k --from runs/pretrain-scout_images_8k --data.sources text=DIR
              video=video:DIR --data.tokenizer F
    Hardware: 256 v5p (v5p:4x8x8)
    Result:   never run; llama4 plan pretrain:scout_images_256k --topology v5p:4x8x8
    """
    return with_images(scout_256k(), "pretrain:scout_images_256k", tiles=256)


def with_images(cfg: RunConfig, name: str, tiles: int) -> RunConfig:
    """A run of full size on text and images: every model gets a tower, a row room for so many tiles."""
    learners = {n: replace(learner, model=with_vision(learner.model)) for n, learner in cfg.learners.items()}
    return replace(cfg, name=name, learners=learners, train=replace(cfg.train, tiles=tiles))


def maverick_8k() -> RunConfig:
    """Maverick, rows of 8,192 tokens, 8.4M tokens a step (untuned).

    Command:  llama4 train pretrain:maverick_8k --data.sources text=DIR --data.tokenizer tokenizer.model
    Hardware: 512 v5p (v5p:8x8x8)
    Result:   never run; llama4 plan pretrain:maverick_8k --topology v5p:8x8x8
    """
    learner = full.learner("maverick", maverick(), microbatches=2, **full.EXPERTS_TRAVEL)
    mesh = MeshConfig(expert=32)
    return full.run("pretrain:maverick_8k", {"maverick": learner}, full.TOKENS["maverick"], 1024, 8192, mesh)


def maverick_256k() -> RunConfig:
    """Maverick's long-context stage, from the end of `maverick_8k`: rows of 262,144, 4.2M tokens a step.

    Command:  llama4 train pretrain:maverick_256k --from runs/pretrain-maverick_8k --data.sources text=DIR
              --data.tokenizer F
    Hardware: 512 v5p (v5p:8x8x8)
    Result:   never run; llama4 plan pretrain:maverick_256k --topology v5p:8x8x8
    """
    learners = {"maverick": full.learner("maverick", maverick(), **full.EXPERTS_TRAVEL)}
    mesh = MeshConfig(expert=16, context=32)
    return full.long_run("pretrain:maverick_256k", maverick_8k(), learners, 16, mesh)


def behemoth_8k() -> RunConfig:
    """Behemoth, rows of 8,192 tokens, 16.8M tokens a step (untuned).

    Command:  llama4 train pretrain:behemoth_8k --data.sources text=DIR --data.tokenizer tokenizer.model
    Hardware: 2,048 v5p (v5p:8x16x16)
    Result:   never run; llama4 plan pretrain:behemoth_8k --topology v5p:8x16x16
    """
    learner = full.learner("behemoth", behemoth(), **full.EXPERTS_TRAVEL)
    mesh = MeshConfig(expert=16)
    return full.run("pretrain:behemoth_8k", {"behemoth": learner}, full.TOKENS["behemoth"], 2048, 8192, mesh)


PRESETS = (
    tiny, tiny_images, tiny_behemoth_teacher, tiny_behemoth_images, tiny_behemoth_long, tiny_long,
    scout_8k, scout_256k, scout_images_8k, scout_images_256k, maverick_8k, maverick_256k, behemoth_8k,
)  # fmt: skip
