"""Cross-entropy and forward KL over chunks of tokens, gradients computed in the forward pass.

A scan over chunks of C tokens forms the chunk's logits [C, V], its losses and dL/dz, from that dL/dh and a sum of
dL/dW in fp32, and drops the logits. The backward pass only scales by the incoming scalar. So no [R, V] array exists,
and three matmuls of [R, D] x [D, V] are all the work there is.

The vocabulary may be split over mesh axes: log-sum-exp, label logit and KL are summed over them; dL/dh comes back
as this device's share (what its columns contribute), dL/dW whole for its own columns. Where rows differ along one of
these axes, a chunk is that of all its devices, and each gets its own rows' losses and dL/dh back.

Letters beside the house's: C rows of a chunk, U width of the teacher.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Targets(NamedTuple):
    """What tokens are scored against; never differentiated."""

    labels_R: jax.Array
    hard_R: jax.Array  # fp32 weight of CE
    soft_R: jax.Array | None  # fp32 weight of KL
    teacher_RU: jax.Array | None  # teacher's hidden states
    teacher_UV: jax.Array | None  # teacher's unembedding, columns split like the student's


class Split(NamedTuple):
    """How the vocabulary lies on the mesh; over nothing on one device."""

    columns: tuple[str, ...] = ()  # mesh axes that split it, the last fastest
    rows: tuple[str, ...] = ()  # those of them along which devices have rows of their own


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def loss(
    h_RD: jax.Array, w_DV: jax.Array, targets: Targets, temperature: float, chunk: int, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(this device's share of the loss, CE_R, KL_R); only the first is differentiable. `chunk` divides R."""
    share, ce_R, kl_R, _ = _scan(h_RD, w_DV, targets, temperature, chunk, split, with_gradient=False)
    return share, ce_R, kl_R


def _forward(h_RD, w_DV, targets, temperature, chunk, split):
    share, ce_R, kl_R, gradients = _scan(h_RD, w_DV, targets, temperature, chunk, split, with_gradient=True)
    return (share, ce_R, kl_R), (gradients, jnp.zeros(0, w_DV.dtype))  # the latter for its dtype


def _backward(temperature, chunk, split, gradients, cotangents):
    (dh_RD, dw_DV), like_w = gradients
    g = cotangents[0]
    return (dh_RD * g).astype(dh_RD.dtype), (dw_DV * g).astype(like_w.dtype), None


loss.defvjp(_forward, _backward)


def _scan(h_RD, w_DV, targets, temperature, chunk, split: Split, with_gradient):
    def cut(x):
        return x.reshape(-1, chunk, *x.shape[1:])

    teacher_UV = targets.teacher_UV
    xs = jax.tree.map(cut, (h_RD, targets._replace(teacher_UV=None)))

    def step(dw_DV, x):
        h_CD, t = jax.tree.map(partial(_together, split=split), x)
        ce_C, kl_C, dz_CV = _chunk(h_CD, w_DV, t._replace(teacher_UV=teacher_UV), temperature, split.columns)
        ce_C, kl_C, t = jax.tree.map(partial(_own, split=split), (ce_C, kl_C, t))
        total = jnp.sum(t.hard_R * ce_C) + (0.0 if t.soft_R is None else temperature**2 * jnp.sum(t.soft_R * kl_C))
        if not with_gradient:
            return dw_DV, (total, ce_C, kl_C, None)
        dz_CV = dz_CV.astype(h_CD.dtype)
        dw_DV += jnp.einsum("CD,CV->DV", h_CD, dz_CV, preferred_element_type=jnp.float32)
        dh_CD = jnp.einsum("CV,DV->CD", dz_CV, w_DV)
        if split.rows:
            dh_CD = jax.lax.psum_scatter(dh_CD, split.rows, scatter_dimension=0, tiled=True)
        return dw_DV, (total, ce_C, kl_C, dh_CD)

    init = jnp.zeros(w_DV.shape, jnp.float32) if with_gradient else None
    dw_DV, (totals, ce, kl, dh) = jax.lax.scan(step, init, xs)
    shares = math.prod(jax.lax.axis_size(name) for name in split.columns if name not in split.rows)
    gradients = None if dh is None else (dh.reshape(h_RD.shape), dw_DV)
    return totals.sum() / shares, ce.reshape(-1), kl.reshape(-1), gradients


def _together(x_C, split: Split):
    """Everyone's rows, this device's among them."""
    return jax.lax.all_gather(x_C, split.rows, axis=0, tiled=True) if split.rows else x_C


def _own(x_C, split: Split):
    """This device's of everyone's rows."""
    if not split.rows:
        return x_C
    C = x_C.shape[0] // math.prod(jax.lax.axis_size(name) for name in split.rows)
    return jax.lax.dynamic_slice_in_dim(x_C, jax.lax.axis_index(split.rows) * C, C)


def _chunk(h_CD, w_DV, t: Targets, temperature: float, axes: tuple[str, ...]):
    """Losses of a chunk and dL/dz = hard (q - y) + soft t (q_t - p_t), for this device's columns."""
    z_CV = jnp.einsum("CD,DV->CV", h_CD, w_DV, preferred_element_type=jnp.float32)
    lse_C = _logsumexp(z_CV, axes)
    column_C = t.labels_R - (jax.lax.axis_index(axes) * z_CV.shape[1] if axes else 0)
    mine_C = (column_C >= 0) & (column_C < z_CV.shape[1])
    label_C = jnp.take_along_axis(z_CV, jnp.where(mine_C, column_C, 0)[:, None], axis=1)[:, 0]
    ce_C = lse_C - _psum(jnp.where(mine_C, label_C, 0.0), axes)
    one_hot_CV = jax.nn.one_hot(jnp.where(mine_C, column_C, -1), z_CV.shape[1], dtype=jnp.float32)
    dz_CV = t.hard_R[:, None] * (jnp.exp(z_CV - lse_C[:, None]) - one_hot_CV)
    if t.teacher_RU is None or t.soft_R is None:
        return ce_C, jnp.zeros_like(ce_C), dz_CV
    log_q_CV = _log_softmax(z_CV / temperature, axes)
    teacher_CV = jnp.einsum("CU,UV->CV", t.teacher_RU, t.teacher_UV, preferred_element_type=jnp.float32)
    log_p_CV = _log_softmax(teacher_CV / temperature, axes)
    p_CV = jnp.exp(log_p_CV)
    kl_C = _psum(jnp.sum(p_CV * (log_p_CV - log_q_CV), axis=-1), axes)
    dz_CV += temperature * t.soft_R[:, None] * (jnp.exp(log_q_CV) - p_CV)
    return ce_C, kl_C, dz_CV


def _psum(x, axes: tuple[str, ...]):
    return jax.lax.psum(x, axes) if axes else x


def _logsumexp(z_CV: Float[Array, "C V"], axes: tuple[str, ...]) -> Float[Array, "C"]:
    top_C = jnp.max(z_CV, axis=-1)
    top_C = jax.lax.pmax(top_C, axes) if axes else top_C
    return top_C + jnp.log(_psum(jnp.sum(jnp.exp(z_CV - top_C[:, None]), axis=-1), axes))


def _log_softmax(z_CV: Float[Array, "C V"], axes: tuple[str, ...]) -> Float[Array, "C V"]:
    return z_CV - _logsumexp(z_CV, axes)[:, None]
