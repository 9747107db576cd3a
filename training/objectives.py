"""What is minimised: pure functions from a model's output, a batch and soft targets to a loss share and sums.

With the weights of a step (`weighting.py`) and the fused loss (`llama4_jax/kernels/vocab_loss`) the whole of
distillation is here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data.batch import Batch
from llama4_jax.axes import EXPERT, MESH_AXES, TOKEN_AXES, VOCAB_AXES, axis_size, present, psum
from llama4_jax.kernels.vocab_loss.api import vocab_loss
from llama4_jax.kernels.vocab_loss.comparison import Comparison, Dense, Stats
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from llama4_jax.moe import router_losses
from llama4_jax.text import Output
from training.config import Learner
from training.weighting import Mix, comparison

BINS = 15
"""Of confidence, in the calibration error (Guo et al., arXiv 1706.04599)."""


class Sums(NamedTuple):
    """Sums over the valid tokens of the global batch; means are taken when they are reported."""

    tokens: jax.Array  # [] valid tokens
    domain_tokens: jax.Array  # [domains]
    by_domain: dict[str, jax.Array]  # [domains] each; see `_rows`
    calibration: jax.Array | None  # [domains, BINS, 3]: tokens, confidence and hits by confidence; if measured
    balance: jax.Array  # [] tokens x balance loss
    z: jax.Array  # [] tokens x router z-loss
    load: jax.Array  # [MoE layers, E] tokens routed to each expert
    dropped: jax.Array  # [MoE layers] pairs of a token and an expert that the dispatch had no room for


def objective(
    out: Output,
    batch: Batch,
    learner: Learner,
    domains: int,
    mix: Mix | None = None,
    teacher: Dense | SparseTargets | None = None,
    measure: bool = False,
) -> tuple[jax.Array, Sums]:
    """This device's share of sum_i m_i [h_i CE_i + s_i g_i t^2 D_i] + n (c_b balance + c_z z), n = sum_i m_i.

    n counts the global microbatch; the caller divides the sum over microbatches by the sum of their n, once. The
    router's losses (`moe.py`) are of the microbatch, over all devices; being means over tokens, n of them enter.
    `mix` holds h and s by domain, constants; without a teacher h = 1. `teacher`: of the rows, [B, T, ...]. Where it has
    no target for a token, CE is all there is of it. Inside `shard_map`.
    """
    mask_R, domain_R = batch.loss_mask.reshape(-1), batch.domain.reshape(-1)
    hard_R, soft_R, toward, how = mask_R, None, None, Comparison(measure=measure)
    if teacher is not None:
        assert mix is not None
        hard_R, soft_R, toward = mask_R * mix.hard[domain_R], mask_R * mix.soft[domain_R], mix.toward
        how = comparison(learner.distillation)
        teacher = _flat(teacher)
        if isinstance(teacher, SparseTargets):
            hard_R = jnp.where(teacher.present, hard_R, mask_R)
            soft_R = jnp.where(teacher.present, soft_R, 0)
    with jax.named_scope("head"):
        share, stats = vocab_loss(
            out.hidden.reshape(mask_R.shape[0], -1), out.unembedding, batch.labels.reshape(-1), hard_R, soft_R, teacher,
            how, toward, columns=present(VOCAB_AXES), rows=present(EXPERT),
        )  # fmt: skip
    tokens = psum(mask_R.sum(), TOKEN_AXES)
    balance, z, router = router_losses(out.router, learner.model.experts_per_token)
    devices = math.prod(axis_size(name) for name in MESH_AXES)
    share += tokens * (learner.router_balance * balance + learner.router_z * z) / devices
    rows = _rows(stats, batch.first_visit.reshape(-1), hard_R, soft_R, how.temperature)
    one_hot_Rd = jax.nn.one_hot(domain_R, domains, dtype=jnp.float32) * mask_R[:, None]
    by_domain = {name: (row[:, None] * one_hot_Rd).sum(axis=0) for name, row in rows.items()}
    calibration = _calibration(stats, one_hot_Rd) if how.measure else None
    domain_tokens, by_domain, calibration = psum((one_hot_Rd.sum(axis=0), by_domain, calibration), TOKEN_AXES)
    sums = Sums(
        tokens, domain_tokens, by_domain, calibration, tokens * balance, tokens * z, router.load, router.dropped
    )
    return share, jax.lax.stop_gradient(sums)


def _flat(teacher: Dense | SparseTargets) -> Dense | SparseTargets:
    """Of rows of tokens [R], from [B, T]."""
    if isinstance(teacher, Dense):
        return teacher._replace(hidden=teacher.hidden.reshape(-1, teacher.hidden.shape[-1]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), teacher)


def _rows(stats: Stats, first_R: jax.Array, hard_R: jax.Array, soft_R: jax.Array | None, temperature: float):
    """What is summed by domain, of each token [R]: ce always; where they were measured, entropy and correct; and with
    a teacher what else is named below, but for weighted and hard of tokens that have a target alone."""
    rows = {"ce": stats.ce}
    if stats.correct is not None:
        rows |= {"correct": stats.correct, "entropy": stats.entropy}
    if soft_R is None:
        return rows
    s, there, better = stats, stats.present, jnp.float32(stats.teacher_ce < stats.ce)
    unseen = there * first_R
    weighted = hard_R * s.ce + soft_R * s.focus * temperature**2 * s.divergence
    of_target = dict(
        divergence=s.divergence, kl=s.kl, reverse_kl=s.reverse_kl, teacher_ce=s.teacher_ce,
        teacher_entropy=s.teacher_entropy, agreement=s.agreement, teacher_better=better, focus=s.focus,
        soft=soft_R * s.focus, hard_norm=s.hard_norm, soft_norm=s.soft_norm, norm_product=s.norm_product,
        hard_square=s.hard_norm**2, soft_square=s.soft_norm**2, tokens=jnp.ones_like(there),
    )  # fmt: skip
    rows |= {"weighted": weighted, "hard": hard_R}
    rows |= {name: row * there for name, row in of_target.items() if row is not None}
    return rows | {"unseen": unseen, "unseen_ce": unseen * s.ce, "unseen_teacher_ce": unseen * s.teacher_ce}


def _calibration(stats: Stats, one_hot_Rd: jax.Array) -> jax.Array:
    """[domains, BINS, 3]."""
    bin_R = jnp.clip((stats.confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    bin_Rb = jax.nn.one_hot(bin_R, BINS, dtype=jnp.float32)
    values_Rs = jnp.stack([jnp.ones_like(stats.ce), stats.confidence, stats.correct], axis=-1)
    by_bin_Rbs = bin_Rb[:, :, None] * values_Rs[:, None, :]
    # Sums, not a matmul, which a TPU would round to bf16.
    return (one_hot_Rd[:, :, None, None] * by_bin_Rbs[:, None]).sum(axis=0)
