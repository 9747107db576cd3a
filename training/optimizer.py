"""AdamW under a warmup-stable-decay schedule; what decays is decided by logical axes, never by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.axes import map_params
from training.config import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[..., jax.Array]:
    """Rate at each step: linear warm-up, the peak held, a linear fall over the last `decay` share of the steps.

    Of the first step it is peak/warmup, not 0, so that no step is lost; `final` is where the fall would come to after
    the last step.
    """
    warmup = min(cfg.warmup, steps)
    start = steps - round(cfg.decay * steps)  # of the fall

    def schedule(step):
        rise = (step + 1) / max(warmup, 1)
        fall = 1 - (1 - cfg.final) * (step - start) / max(steps - start, 1)
        return cfg.learning_rate * jnp.minimum(jnp.minimum(rise, 1.0), jnp.clip(fall, cfg.final, 1.0))

    return schedule


def decays(params: Any) -> Any:
    """True for weights with at least two logical axes: matrices, not scales, stacked over layers or not."""
    return map_params(lambda p: p.replace(len(p.axes) >= 2), params)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam in fp32, decoupled weight decay, learning rate (Loshchilov & Hutter, 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(cfg, steps)),
    )
