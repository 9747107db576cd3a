"""What is minimised: pure functions from a model's output, a batch and soft targets to a loss share and sums.

The whole of distillation is here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data.batch import Batch
from llama4_jax.axes import EXPERT, MESH_AXES, TOKEN_AXES, VOCAB_AXES, axis_size, present, psum
from llama4_jax.kernels.vocab_loss.api import vocab_loss
from llama4_jax.moe import router_losses
from llama4_jax.text import Output
from training.config import Distillation, Learner


class Sums(NamedTuple):
    """Sums over the valid tokens of the global batch; means are taken when they are reported."""

    tokens: jax.Array  # [] valid tokens
    domain_tokens: jax.Array  # [domains]
    domain_ce: jax.Array  # [domains], nats
    domain_kl: jax.Array  # [domains], nats, KL(teacher || student) at the temperature of the loss; 0 without teacher
    balance: jax.Array  # [] tokens x balance loss
    z: jax.Array  # [] tokens x router z-loss
    load: jax.Array  # [MoE layers, E] tokens routed to each expert
    dropped: jax.Array  # [MoE layers] pairs of a token and an expert that the dispatch had no room for


class SoftTargets(NamedTuple):
    """What a teacher hands on: never logits, and always under `stop_gradient`."""

    hidden: jax.Array  # [B, T, U]
    unembedding: jax.Array  # [U, V], this device's columns


def weights(cfg: Distillation, rate: jax.Array, peak: float) -> tuple[jax.Array, jax.Array]:
    """(h, s) of a step: s is the peak soft weight, under `wsd` times rate/peak of the learning rate; h = 1 - s.

    Tying s to a warmup-stable-decay learning rate is Peng et al.'s best schedule (arXiv 2410.16215, WSD-alpha).
    """
    if not cfg.teacher:
        return jnp.float32(1), jnp.float32(0)
    soft = jnp.float32(cfg.soft) * (rate / peak if cfg.weighting == "wsd" else 1.0)
    return 1 - soft, soft


def objective(
    out: Output,
    batch: Batch,
    learner: Learner,
    domains: int,
    mix: tuple[jax.Array, jax.Array],
    targets: SoftTargets | None = None,
) -> tuple[jax.Array, Sums]:
    """This device's share of sum_i m_i [h CE_i + s t^2 KL_i] + n (c_b balance + c_z z), n = sum_i m_i.

    n counts the global microbatch; the caller divides the sum over microbatches by the sum of their n, once. The
    router's losses (`moe.py`) are of the microbatch, over all devices; being means over tokens, n of them enter.
    `mix` is (h, s), constants. Inside `shard_map`.
    """
    mask_R = batch.loss_mask.reshape(-1)
    hard, soft = mix
    teacher = targets and (targets.hidden.reshape(mask_R.shape[0], -1), targets.unembedding)
    with jax.named_scope("head"):
        share, ce_R, kl_R = vocab_loss(
            out.hidden.reshape(mask_R.shape[0], -1), out.unembedding, batch.labels.reshape(-1),
            hard * mask_R, None if teacher is None else soft * mask_R, teacher, learner.distillation.temperature,
            columns=present(VOCAB_AXES), rows=present(EXPERT),
        )  # fmt: skip
    tokens = psum(mask_R.sum(), TOKEN_AXES)
    balance, z, router = router_losses(out.router, learner.model.experts_per_token)
    devices = math.prod(axis_size(name) for name in MESH_AXES)
    share += tokens * (learner.router_balance * balance + learner.router_z * z) / devices
    by_domain = jax.nn.one_hot(batch.domain.reshape(-1), domains, dtype=jnp.float32) * mask_R[:, None]
    domain_tokens, domain_ce, domain_kl = psum(
        (by_domain.sum(axis=0), (ce_R[:, None] * by_domain).sum(axis=0), (kl_R[:, None] * by_domain).sum(axis=0)),
        TOKEN_AXES,
    )
    sums = Sums(tokens, domain_tokens, domain_ce, domain_kl, tokens * balance, tokens * z, router.load, router.dropped)
    return share, jax.lax.stop_gradient(sums)
