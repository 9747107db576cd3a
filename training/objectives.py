"""What is minimised: pure functions from a model's output and a batch to a loss share and sums for the metrics."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data.batch import Batch
from llama4_jax.axes import MESH_AXES, TENSOR, TOKEN_AXES, axis_size, present, psum
from llama4_jax.kernels.vocab_loss.api import vocab_loss
from llama4_jax.moe import RouterStats, router_losses
from llama4_jax.text import Output
from training.config import Learner


class Sums(NamedTuple):
    """Sums over the valid tokens of the global batch; means are taken when they are reported."""

    tokens: jax.Array  # [] valid tokens
    domain_tokens: jax.Array  # [domains]
    domain_ce: jax.Array  # [domains], nats
    balance: jax.Array  # [] tokens x balance loss
    z: jax.Array  # [] tokens x router z-loss
    load: jax.Array  # [MoE layers, E] tokens routed to each expert


def next_token(out: Output, batch: Batch, learner: Learner, domains: int) -> tuple[jax.Array, Sums]:
    """This device's share of sum_i m_i CE_i + n (c_b balance + c_z z), n = sum_i m_i over the global microbatch.

    The caller divides the sum over microbatches by the sum of their n, once. The router's losses (`moe.py`) are of
    the microbatch, over all devices; as they are means over tokens, n of them enter. Inside `shard_map`.
    """
    mask_R = batch.loss_mask.reshape(-1)
    axis = TENSOR if present(TENSOR) else None
    share, ce_R, _ = vocab_loss(
        out.hidden.reshape(-1, out.hidden.shape[-1]), out.unembedding, batch.labels.reshape(-1), mask_R, axis=axis
    )
    tokens = psum(mask_R.sum(), TOKEN_AXES)
    balance, z, stats = _router(out.router, learner)
    devices = 1
    for name in MESH_AXES:
        devices *= axis_size(name)
    share += tokens * (learner.router_balance * balance + learner.router_z * z) / devices
    by_domain = jax.nn.one_hot(batch.domain.reshape(-1), domains, dtype=jnp.float32) * mask_R[:, None]
    domain_tokens, domain_ce = psum((by_domain.sum(axis=0), ce_R @ by_domain), TOKEN_AXES)
    sums = Sums(tokens, domain_tokens, domain_ce, tokens * balance, tokens * z, stats)
    return share, jax.lax.stop_gradient(sums)


def _router(stats: RouterStats | None, learner: Learner) -> tuple[jax.Array, jax.Array, jax.Array]:
    if stats is None:
        return jnp.float32(0), jnp.float32(0), jnp.zeros((0, 0))
    balance, z, total = router_losses(stats, learner.model.experts_per_token)
    return balance, z, total.load
