"""The router's bias: balancing loads without a loss (Wang et al., 2408.15664; DeepSeek-V3, 2412.19437, section 2.1.2).

Where `ModelConfig.router_bias`, each expert of a MoE layer has a bias b_e that is added to its logit to choose experts
by, and to nothing else. No gradient reaches it; after each optimizer step it follows the load of the global batch,

    b_e += u sign(mean load - load_e),      u = `Learner.router_bias_speed`,

so that an expert above the mean loses the tokens it won narrowly. The papers add b to the sigmoid of the logit, whose
slope is at most 1/4, so their u is worth 4u or more here. Hugging Face's Llama 4 has no bias: over the steps in which
the learning rate falls b falls instead, linearly and to exactly 0; with r steps to go, this one included,
b <- b (r - 1) / r. Evenness goes with it where no balance loss keeps it: on `pretrain:tiny` with --router-balance 0 the
busiest expert of the worst layer had 1.5 times the mean load before the fall and 2.7 times after (without b 2.5 both
times, with the loss alone 2.0 and 1.4; u = 0.01, one seed).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llama4_jax.hf import ROUTER_BIAS
from training.config import Learner
from training.state import LearnerState


def follow_load(
    learner: Learner, state: LearnerState, load_LE: Float[Array, "L E"], step: jax.Array, steps: int
) -> LearnerState:
    """The state after step `step` (from 0) of `steps`, in which MoE layer l sent load_LE[l, e] tokens to expert e."""
    if not learner.model.router_bias or learner.optimizer is None:
        return state
    falling = step >= learner.optimizer.fall_start(steps)
    left = jnp.maximum(steps - 1 - step, 0)

    def moved(b: jax.Array, load: jax.Array) -> jax.Array:
        towards_even = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
        return jnp.where(falling, b * (left / (left + 1)), b + learner.router_bias_speed * towards_even)

    # Loads follow each other block by block; weights are stacked over blocks, their paths hold the layer within one.
    moe = [i for i, kind in enumerate(learner.model.pattern) if kind.moe]
    by_block = load_LE.reshape(-1, len(moe), load_LE.shape[1])
    load_of: dict[Any, jax.Array] = {i: by_block[:, n] for n, i in enumerate(moe)}
    params = [
        (path, p.replace(moved(p.get_value(), load_of[path[2]])) if path[-1] == ROUTER_BIAS else p)
        for path, p in nnx.to_flat_state(state.params)
    ]
    return state._replace(params=nnx.from_flat_state(params))
