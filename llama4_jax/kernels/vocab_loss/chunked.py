"""The loss over chunks of tokens, gradients computed in the forward pass.

A scan over chunks of C tokens forms the chunk's logits [C, V], its losses and dL/dz, from that dL/dh and a sum of
dL/dW in fp32, and drops the logits. The backward pass only scales by the incoming scalar. So no [R, V] array exists,
and three matmuls of [R, D] x [D, V] are all the work there is, with a fourth for the teacher's logits.

The vocabulary may be split over mesh axes: what is a sum or a maximum over it is summed or maximised over them; dL/dh
comes back as this device's share (what its columns contribute), dL/dW whole for its own columns. Where rows differ
along one of these axes, a chunk is that of all its devices, and each gets its own rows' losses and dL/dh back.

Letters beside the house's: C rows of a chunk, U width of the teacher, K entries of a sparse target.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from llama4_jax.kernels.vocab_loss.comparison import Comparison, Stats
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets


class Targets(NamedTuple):
    """What tokens are scored against; never differentiated."""

    labels_R: jax.Array
    hard_R: jax.Array  # fp32 weight of CE
    soft_R: jax.Array | None  # fp32 weight of the divergence
    taught: jax.Array | SparseTargets | None  # the teacher's hidden states [R, U], or entries of its distribution


class Split(NamedTuple):
    """How the vocabulary lies on the mesh; over nothing on one device."""

    columns: tuple[str, ...] = ()  # mesh axes that split it, the last fastest
    rows: tuple[str, ...] = ()  # those of them along which devices have rows of their own


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def loss(
    h_RD: jax.Array, w_DV: jax.Array, targets: Targets, teacher_UV: jax.Array | None, toward: jax.Array | None,
    comparison: Comparison, chunk: int, split: Split,
) -> tuple[jax.Array, Stats]:  # fmt: skip
    """(this device's share of the loss, statistics of its rows); the first is differentiable. `chunk` divides R."""
    share, stats, _ = _scan(h_RD, w_DV, targets, teacher_UV, toward, comparison, chunk, split, with_gradient=False)
    return share, stats


def _forward(h_RD, w_DV, targets, teacher_UV, toward, comparison, chunk, split):
    share, stats, gradients = _scan(
        h_RD, w_DV, targets, teacher_UV, toward, comparison, chunk, split, with_gradient=True
    )
    return (share, stats), (gradients, jnp.zeros(0, w_DV.dtype))  # the latter for its dtype


def _backward(comparison, chunk, split, gradients, cotangents):
    (dh_RD, dw_DV), like_w = gradients
    g = cotangents[0]
    return (dh_RD * g).astype(dh_RD.dtype), (dw_DV * g).astype(like_w.dtype), None, None, None


loss.defvjp(_forward, _backward)


def _scan(h_RD, w_DV, targets: Targets, teacher_UV, toward, comparison: Comparison, chunk, split: Split, with_gradient):
    def step(dw_DV, x):
        h_CD, t = jax.tree.map(partial(_together, split=split), x)
        stats, dz_CV = _chunk(h_CD, w_DV, t, teacher_UV, toward, comparison, split.columns)
        stats, t = jax.tree.map(partial(_own, split=split), (stats, t))
        total = jnp.sum(t.hard_R * stats.ce)
        if t.soft_R is not None:
            total += comparison.temperature**2 * jnp.sum(t.soft_R * stats.focus * stats.divergence)
        if not with_gradient:
            return dw_DV, (total, stats, None)
        dz_CV = dz_CV.astype(h_CD.dtype)
        dw_DV += jnp.einsum("CD,CV->DV", h_CD, dz_CV, preferred_element_type=jnp.float32)
        dh_CD = jnp.einsum("CV,DV->CD", dz_CV, w_DV)
        if split.rows:
            dh_CD = jax.lax.psum_scatter(dh_CD, split.rows, scatter_dimension=0, tiled=True)
        return dw_DV, (total, stats, dh_CD)

    xs = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (h_RD, targets))
    init = jnp.zeros(w_DV.shape, jnp.float32) if with_gradient else None
    dw_DV, (totals, stats, dh) = jax.lax.scan(step, init, xs)
    shares = math.prod(jax.lax.axis_size(name) for name in split.columns if name not in split.rows)
    gradients = None if dh is None else (dh.reshape(h_RD.shape), dw_DV)
    return totals.sum() / shares, jax.tree.map(lambda x: x.reshape(-1), stats), gradients


def _together(x_C, split: Split):
    """Everyone's rows, this device's among them."""
    return jax.lax.all_gather(x_C, split.rows, axis=0, tiled=True) if split.rows else x_C


def _own(x_C, split: Split):
    """This device's of everyone's rows."""
    if not split.rows:
        return x_C
    C = x_C.shape[0] // math.prod(jax.lax.axis_size(name) for name in split.rows)
    return jax.lax.dynamic_slice_in_dim(x_C, jax.lax.axis_index(split.rows) * C, C)


def _chunk(h_CD, w_DV, t: Targets, teacher_UV, toward, comparison: Comparison, axes: tuple[str, ...]):
    """Statistics of a chunk and dL/dz = hard (q - y) + soft g t^2 dD/dz, for this device's columns."""
    z_CV = jnp.einsum("CD,DV->CV", h_CD, w_DV, preferred_element_type=jnp.float32)
    at = _Columns(z_CV.shape[1], axes)
    lse_C, top_C = _logsumexp(z_CV, axes)
    label_C = at.take(z_CV, t.labels_R[:, None])[:, 0]
    log_q_CV = z_CV - lse_C[:, None]
    q_CV = jnp.exp(log_q_CV)
    hard_CV = q_CV - at.one_hot(t.labels_R)
    stats, likeliest_C = Stats(lse_C - label_C), lse_C
    if comparison.measure or comparison.focus == "student_entropy":
        stats = stats._replace(entropy=-_psum(jnp.sum(q_CV * log_q_CV, axis=-1), axes))
    if comparison.measure:
        stats = stats._replace(confidence=jnp.exp(top_C - lse_C), correct=jnp.float32(label_C >= top_C))
    dz_CV = t.hard_R[:, None] * hard_CV
    if t.taught is None or t.soft_R is None:
        return stats, dz_CV
    if isinstance(t.taught, SparseTargets):
        of_teacher, soft_CV = _sparse(log_q_CV, q_CV, t.taught, comparison, at)
        likeliest_C = at.take(z_CV, t.taught.ids[:, :1])[:, 0]
    else:
        teacher_CV = jnp.einsum("CU,UV->CV", t.taught, teacher_UV, preferred_element_type=jnp.float32)
        of_teacher, soft_CV = _dense(z_CV, log_q_CV, teacher_CV, t.labels_R, toward, comparison, at)
        if comparison.measure:
            likeliest_C = _at_likeliest(z_CV, teacher_CV, axes)
    stats = stats._replace(**of_teacher)
    focus_C = jnp.ones_like(lse_C)
    if comparison.focus == "confidence":
        focus_C = 1 - stats.teacher_entropy / jnp.log(at.vocabulary)
    elif comparison.focus == "student_entropy":
        focus_C = stats.entropy / jnp.log(at.vocabulary)
    elif comparison.focus == "disagreement":
        focus_C = stats.focus
    stats = stats._replace(focus=focus_C)
    if comparison.measure:
        parts = [hard_CV * hard_CV, soft_CV * soft_CV, hard_CV * soft_CV]
        squares = _psum(jnp.stack([jnp.sum(x, axis=-1) for x in parts]), axes)
        stats = stats._replace(hard_norm=jnp.sqrt(squares[0]), soft_norm=jnp.sqrt(squares[1]), norm_product=squares[2],
                               agreement=jnp.float32(likeliest_C >= top_C))  # fmt: skip
    else:
        stats = Stats(stats.ce, stats.divergence, focus_C)
    return stats, dz_CV + (t.soft_R * focus_C)[:, None] * soft_CV


def _dense(z_CV, log_q1_CV, teacher_CV, labels_C, toward, comparison: Comparison, at: _Columns):
    """(statistics of a chunk that know the teacher, t^2 dD/dz) from the teacher's logits."""
    T, axes = comparison.temperature, at.axes
    lse_C = _logsumexp(teacher_CV, axes)[0]
    log_p1_CV = teacher_CV - lse_C[:, None]
    log_q_CV = log_q1_CV if T == 1 else _log_softmax(z_CV / T, axes)
    log_p_CV = log_p1_CV if T == 1 else _log_softmax(teacher_CV / T, axes)
    if toward is not None:
        log_p_CV = _log_softmax(((1 - toward) * z_CV + toward * teacher_CV) / T, axes)
    p_CV, q_CV = jnp.exp(log_p_CV), jnp.exp(log_q_CV)
    sums = {}
    if comparison.kind == "kl":
        sums["divergence"] = p_CV * (log_p_CV - log_q_CV)
        soft_CV = T * (q_CV - p_CV)
    else:
        sums["divergence"], qr_CV = _slope(comparison, log_p_CV, log_q_CV, p_CV, q_CV)
        soft_CV = T * (qr_CV - q_CV * _psum(jnp.sum(qr_CV, axis=-1), axes)[:, None])
    if comparison.measure or comparison.focus != "none":
        p1_CV, q1_CV = (p_CV, q_CV) if T == 1 and toward is None else (jnp.exp(log_p1_CV), jnp.exp(log_q1_CV))
        sums["teacher_entropy"] = -p1_CV * log_p1_CV
        if comparison.focus == "disagreement":
            sums["focus"] = p1_CV - jnp.exp((log_p1_CV + log_q1_CV) / 2)  # p sums to 1
        if comparison.measure:
            sums["kl"] = p1_CV * (log_p1_CV - log_q1_CV)
            sums["reverse_kl"] = q1_CV * (log_q1_CV - log_p1_CV)
    summed = _psum(jnp.stack([jnp.sum(x, axis=-1) for x in sums.values()]), axes)
    stats = dict(zip(sums, summed, strict=True))
    if comparison.measure:
        stats["teacher_ce"] = lse_C - at.take(teacher_CV, labels_C[:, None])[:, 0]
        stats["present"] = jnp.ones_like(lse_C)
    return stats, soft_CV


def _slope(comparison: Comparison, log_p, log_q, p, q):
    """(what sums to D, q r) with dD/dz = q (r - sum q r)."""
    b = comparison.skew
    if comparison.kind == "reverse_kl":
        return q * (log_q - log_p), q * (log_q - log_p)
    share = 1 - b if comparison.kind == "skew_reverse_kl" else b  # of p in the mixture m
    log_m = jnp.logaddexp(math.log(share) + log_p, math.log1p(-share) + log_q)
    if comparison.kind == "skew_kl":
        return p * (log_p - log_m), -(1 - b) * jnp.exp(log_p + log_q - log_m)
    if comparison.kind == "skew_reverse_kl":
        return q * (log_q - log_m), q * (log_q - log_m + 1 - b * jnp.exp(log_q - log_m))
    return b * p * (log_p - log_m) + (1 - b) * q * (log_q - log_m), (1 - b) * q * (log_q - log_m)


def _sparse(log_q_CV, q_CV, t: SparseTargets, comparison: Comparison, at: _Columns):
    """(statistics of a chunk that know the teacher, dD/dz) from entries of its distribution."""
    used_CK = t.ids >= 0
    log_q_CK = at.take(log_q_CV, t.ids)
    q_CK = jnp.where(used_CK, jnp.exp(log_q_CK), 0)
    # 1 - sum q, without which the bucket would be empty where rounding says so; there it has no gradient.
    on_C, least = q_CK.sum(axis=-1), jnp.finfo(jnp.float32).eps
    bucket_C = t.tail > 0
    rest_C = jnp.where(bucket_C, jnp.maximum(1 - on_C, least), 1.0)
    cross_C = jnp.sum(jnp.where(used_CK, t.mass * log_q_CK, 0), axis=-1) + t.tail * jnp.log(rest_C)
    own_C = jnp.where(bucket_C, xlogy(t.mass, t.mass).sum(axis=-1) + xlogy(t.tail, t.tail), -t.entropy)
    kl_C = jnp.where(t.present, own_C - cross_C, 0)
    slope_C = jnp.where(bucket_C & (1 - on_C > least), t.tail / rest_C, 0)
    entries_CK = slope_C[:, None] * q_CK - t.mass
    soft_CV = q_CV * (t.mass.sum(axis=-1) - slope_C * on_C)[:, None]
    soft_CV = jnp.where(t.present[:, None], at.add(soft_CV, t.ids, entries_CK), 0)
    present_C = jnp.float32(t.present)
    stats = dict(divergence=kl_C, teacher_entropy=t.entropy)
    if comparison.measure:
        stats |= dict(kl=kl_C, teacher_ce=-t.label_logp, present=present_C)
    return stats, soft_CV


class _Columns:
    """This device's columns of the vocabulary: entries by their global ids."""

    def __init__(self, width: int, axes: tuple[str, ...]):
        self.width, self.axes = width, axes
        self.vocabulary = width * math.prod(jax.lax.axis_size(name) for name in axes)

    def _local(self, ids):
        column = ids - (jax.lax.axis_index(self.axes) * self.width if self.axes else 0)
        return column, (ids >= 0) & (column >= 0) & (column < self.width)

    def take(self, x_CV, ids_CK):
        """x at the ids, whose columns may be another device's; 0 at id -1."""
        column, mine = self._local(ids_CK)
        return _psum(jnp.where(mine, jnp.take_along_axis(x_CV, jnp.where(mine, column, 0), axis=1), 0.0), self.axes)

    def one_hot(self, ids_C):
        column, mine = self._local(ids_C)
        return jax.nn.one_hot(jnp.where(mine, column, -1), self.width, dtype=jnp.float32)

    def add(self, x_CV, ids_CK, values_CK):
        """x with values added at those of the ids that are this device's."""
        column, mine = self._local(ids_CK)
        rows = jnp.arange(x_CV.shape[0])[:, None]
        return x_CV.at[rows, jnp.where(mine, column, self.width)].add(values_CK, mode="drop")


def _at_likeliest(z_CV, teacher_CV, axes: tuple[str, ...]):
    """The student's logit of the teacher's likeliest token."""
    best_C = jnp.max(teacher_CV, axis=-1)
    z_C = jnp.take_along_axis(z_CV, jnp.argmax(teacher_CV, axis=-1)[:, None], axis=1)[:, 0]
    return jax.lax.pmax(jnp.where(best_C >= jax.lax.pmax(best_C, axes), z_C, -jnp.inf), axes) if axes else z_C


def _psum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _logsumexp(z_CV: Float[Array, "C V"], axes: tuple[str, ...]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Also the largest."""
    top_C = jnp.max(z_CV, axis=-1)
    top_C = jax.lax.pmax(top_C, axes) if axes else top_C
    return top_C + jnp.log(_psum(jnp.sum(jnp.exp(z_CV - top_C[:, None]), axis=-1), axes)), top_C


def _log_softmax(z_CV: Float[Array, "C V"], axes: tuple[str, ...]) -> Float[Array, "C V"]:
    return z_CV - _logsumexp(z_CV, axes)[0][:, None]
