"""What presets of full size share: batches, token budgets, rates and meshes, each with its source or "untuned".

Nothing of this was run: `docs/plans/` holds what the compiler and the data sheets say of each. All of them need
documents and a tokenizer of 202,048 tokens or fewer: `--data.sources text=DIR --data.tokenizer tokenizer.model`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data.config import DataConfig
from llama4_jax.config import ModelConfig
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig

TRILLION = 10**12
LONG = 262_144

EXPERTS_TRAVEL: dict[str, Any] = dict(dispatch="all_to_all", capacity=1.25)
"""Tokens go to the experts over the mesh axis `expert`; capacity as MaxText's and Megatron's usual one, untuned."""

# Peak rate and warm-up of a model of so many active parameters: Llama 3's of 70B and 405B (arXiv 2407.21783, table 3
# and section 3.4.1: 1.5e-4 and 8e-5, 8,000 steps of warm-up), untuned here. The long-context stage goes on at the rate
# that the first one fell to, untuned. Meta set its own by MetaP, which is not published.
LEARNING_RATE = {"scout": 1.5e-4, "maverick": 1.5e-4, "behemoth": 8e-5}
WARMUP = 8000
LONG_RATE = 0.1

# Tokens: Meta's model card of Llama 4 (Scout "~40 trillion", Maverick "~22 trillion"); of Behemoth its announcement
# says "more than 30 trillion". The long-context stage: Llama 3's 800 billion (arXiv 2407.21783, section 3.4.2).
TOKENS = {"scout": 40 * TRILLION, "maverick": 22 * TRILLION, "behemoth": 30 * TRILLION}
LONG_TOKENS = 8 * TRILLION // 10
DISTILLED_TOKENS = TRILLION
"""Of a student whose teacher is trained already: untuned."""


def learner(name: str, model: ModelConfig, **how: Any) -> Learner:
    """A learner of full size, each layer recomputed from its input."""
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE[name], warmup=WARMUP)
    return replace(Learner(model, optimizer, remat="layer"), **how)


def run(
    name: str, learners: dict[str, Learner], tokens: int, batch: int, seq_len: int, mesh: MeshConfig, every: int = 500
) -> RunConfig:
    """A run of as many steps as `tokens` need, with checkpoints and evaluations `every` so many of them."""
    train = TrainConfig(
        steps=-(-tokens // (batch * seq_len)), batch=batch, seq_len=seq_len, eval_every=every, checkpoint_every=every
    )
    vocab_size = next(iter(learners.values())).model.vocab_size
    return RunConfig(name, learners, DataConfig(vocab_size=vocab_size), mesh, train)


def long_run(name: str, short: RunConfig, learners: dict[str, Learner], batch: int, mesh: MeshConfig) -> RunConfig:
    """The long-context stage, begun with --from at the end of `short`, whose steps it goes on counting.

    Its rate is the last one of `short`, falling to nothing.
    """
    steps = short.train.steps
    rate = dict(warmup=0, decay=1.0, final=0.0, start=steps)
    out = run(name, learners, LONG_TOKENS, batch, LONG, mesh)
    learners = {
        name: replace(one, optimizer=replace(
            one.optimizer, learning_rate=LONG_RATE * one.optimizer.learning_rate, **rate))
        for name, one in learners.items()
        if one.optimizer
    }  # fmt: skip
    return replace(out, learners=learners, train=replace(out.train, steps=steps + out.train.steps))
