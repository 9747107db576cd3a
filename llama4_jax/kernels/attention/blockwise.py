"""Attention in blocks with an online softmax, in plain jax.numpy: linear memory, any shape, any platform.

For a block of queries the keys are walked block by block, holding the maximum m, the sum l of exp(s - m) and the
weighted sum of values, which are rescaled as m grows. What is kept for the backward pass is the output o and the
logsumexp L = m + log l; with p = exp(s - L), dp = do v^T and ds = p (dp - rowsum(do o)), it walks the same blocks:

    dv = p^T do      dq = ds k      dk = ds^T q

(arXiv 2205.14135). Blocks that causality or the documents rule out are not walked.

Letters: I blocks of T queries, J blocks of S keys.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.attention.api import RESIDUALS

BLOCK = 128
"""Most queries of a block, and most keys; of 64 to 512 the fastest on CPUs."""
HIDDEN, PARTIAL, FULL = 0, 1, 2
"""What causality and documents leave of a pair of blocks: nothing; some or, for all we know, all; all but documents."""
NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a hidden key: finite, so that the difference of two is a number."""


def block_states(
    positions_IT: Int[Array, "I T"], q_segments_IBT: Int[Array, "I B T"], kv_segments_JBS: Int[Array, "J B S"]
) -> Int[Array, "I J"]:
    """For each block of queries and of keys, over all rows B: `HIDDEN`, `PARTIAL` or `FULL`.

    Exact for causality. Of documents the ranges of ids on both sides are compared, which hides no visible pair.
    """
    S = kv_segments_JBS.shape[-1]
    first_J = jnp.arange(kv_segments_JBS.shape[0]) * S
    reached_IJ = positions_IT.max(1)[:, None] >= first_J[None, :]
    passed_IJ = positions_IT.min(1)[:, None] >= first_J[None, :] + S - 1
    q_low, q_high = q_segments_IBT.min(2)[:, None], q_segments_IBT.max(2)[:, None]
    meet_IJ = ((q_low <= kv_segments_JBS.max(2)[None]) & (q_high >= kv_segments_JBS.min(2)[None])).any(2)
    return jnp.where(reached_IJ & meet_IJ, jnp.where(passed_IJ, FULL, PARTIAL), HIDDEN)


class _Blocks(NamedTuple):
    """Where queries and keys stand, in blocks; [lo, hi) are the blocks of keys that a block of queries walks."""

    positions_IT: jax.Array
    q_segments_IBT: jax.Array
    kv_segments_JBS: jax.Array
    lo_I: jax.Array
    hi_I: jax.Array

    def visible(self, i, j) -> jax.Array:
        """[B, 1, 1, T, S]"""
        S = self.kv_segments_JBS.shape[-1]
        causal_TS = self.positions_IT[i][:, None] >= (j * S + jnp.arange(S))[None, :]
        same_BTS = self.q_segments_IBT[i][:, :, None] == self.kv_segments_JBS[j][:, None, :]
        return (causal_TS[None] & same_BTS)[:, None, None]

    def walk(self, i, body, carry):
        """`carry` through `body(j, carry)` for the blocks of keys of block i of queries."""
        if self.kv_segments_JBS.shape[0] == 1:
            return body(0, carry)
        return jax.lax.fori_loop(self.lo_I[i], self.hi_I[i], body, carry)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
) -> Float[Array, "B T N H"]:
    """See `api`."""
    q_IBKGTH, k_JBKSH, v_JBKSH, blocks = _in_blocks(
        q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_positions_T
    )
    return _heads_last(_attend(q_IBKGTH, k_JBKSH, v_JBKSH, blocks), q_BTNH.shape)


def attention_and_logsumexp(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The same with the fp32 logarithm of its sum of exponents, by which parts of the keys can be joined; no gradients.

    A query may see none of the keys, or stand before the first one (at a negative position): the logarithm is then so
    low that what comes with it, which means nothing, weighs nothing beside any other part.
    """
    blocks = _in_blocks(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_positions_T)
    out_IBKGTH, (*_, logsumexp_IBKGT) = _forward(*blocks)
    B, T, N, H = q_BTNH.shape
    return _heads_last(out_IBKGTH, (B, T, N, H)), _heads_last(logsumexp_IBKGT[..., None], (B, T, N, 1))[..., 0]


def _in_blocks(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_positions_T):
    """Arguments of `_attend`."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    positions_T = jnp.arange(T) if q_positions_T is None else q_positions_T

    # Rows of padding are of documents that nobody else is of.
    q_segments_IBT = _cut(q_segments_BT, 1, constant_values=-1)
    kv_segments_JBS = _cut(kv_segments_BS, 1, constant_values=-2)
    positions_IT = _cut(positions_T, 0, mode="edge")
    walked_IJ = block_states(positions_IT, q_segments_IBT, kv_segments_JBS) != HIDDEN
    lo_I, hi_I = jnp.argmax(walked_IJ, 1), walked_IJ.shape[1] - jnp.argmax(walked_IJ[:, ::-1], 1)
    blocks = _Blocks(positions_IT, q_segments_IBT, kv_segments_JBS, lo_I, hi_I)

    q_BTKGH = (q_BTNH * H**-0.5).astype(q_BTNH.dtype).reshape(B, T, K, N // K, H)
    q_IBKGTH = jnp.moveaxis(_cut(q_BTKGH, 1), 2, 4)
    k_JBKSH, v_JBKSH = (_cut(x, 1).swapaxes(2, 3) for x in (k_BSKH, v_BSKH))
    return q_IBKGTH, k_JBKSH, v_JBKSH, blocks


def _heads_last(x_IBKGTH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Blocks of queries put together: [B, T, N, H]."""
    B, T, N, H = shape
    return jnp.transpose(x_IBKGTH, (1, 0, 4, 2, 3, 5)).reshape(B, -1, N, H)[:, :T]


def _cut(x: jax.Array, dim: int, **padding) -> jax.Array:
    """Dimension `dim` in equal blocks, padded to fill them; their number stands in front."""
    count = -(-x.shape[dim] // BLOCK)
    size = -(-x.shape[dim] // count)
    x = jnp.pad(x, [(0, (count * size - n) * (d == dim)) for d, n in enumerate(x.shape)], **padding)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :]), dim, 0)


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(q_IBKGTH, k_JBKSH, v_JBKSH, blocks: _Blocks):
    return _forward(q_IBKGTH, k_JBKSH, v_JBKSH, blocks)[0]


def _forward(q_IBKGTH, k_JBKSH, v_JBKSH, blocks: _Blocks):
    def row(numbered):
        i, q_BKGTH = numbered

        def body(j, carry):
            highest, total, weighted_BKGTH = carry
            scores = jnp.where(blocks.visible(i, j), _dot("BKGTH,BKSH->BKGTS", q_BKGTH, k_JBKSH[j]), NEVER)
            higher = jnp.maximum(highest, scores.max(-1))
            p = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(highest - higher)
            new = _dot("BKGTS,BKSH->BKGTH", p.astype(v_JBKSH.dtype), v_JBKSH[j])
            return higher, total * shrink + p.sum(-1), weighted_BKGTH * shrink[..., None] + new

        zeros = jnp.zeros(q_BKGTH.shape, jnp.float32)
        highest, total, weighted_BKGTH = blocks.walk(i, body, (zeros[..., 0] + NEVER, zeros[..., 0], zeros))
        return (weighted_BKGTH / total[..., None]).astype(q_BKGTH.dtype), highest + jnp.log(total)

    rows = jax.lax.map(row, (jnp.arange(q_IBKGTH.shape[0]), q_IBKGTH))
    out, logsumexp = checkpoint_name(rows, RESIDUALS)
    return out, (q_IBKGTH, k_JBKSH, v_JBKSH, blocks, out, logsumexp)


def _backward(saved, dout_IBKGTH):
    q_IBKGTH, k_JBKSH, v_JBKSH, blocks, out_IBKGTH, logsumexp_IBKGT = saved

    def row(grads, numbered):
        i, q, out, logsumexp, dout = numbered
        shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)[..., None]

        def body(j, carry):
            dq, dk_JBKSH, dv_JBKSH = carry
            k, v = k_JBKSH[j], v_JBKSH[j]
            scores = jnp.where(blocks.visible(i, j), _dot("BKGTH,BKSH->BKGTS", q, k), NEVER)
            p = jnp.exp(scores - logsumexp[..., None])
            ds = (p * (_dot("BKGTH,BKSH->BKGTS", dout, v) - shift)).astype(q.dtype)
            dv_JBKSH = dv_JBKSH.at[j].add(_dot("BKGTS,BKGTH->BKSH", p.astype(q.dtype), dout))
            dk_JBKSH = dk_JBKSH.at[j].add(_dot("BKGTS,BKGTH->BKSH", ds, q))
            return dq + _dot("BKGTS,BKSH->BKGTH", ds, k), dk_JBKSH, dv_JBKSH

        dq, *grads = blocks.walk(i, body, (jnp.zeros(q.shape, jnp.float32), *grads))
        return tuple(grads), dq.astype(q.dtype)

    zeros = jnp.zeros(k_JBKSH.shape, jnp.float32)
    rows = (jnp.arange(q_IBKGTH.shape[0]), q_IBKGTH, out_IBKGTH, logsumexp_IBKGT, dout_IBKGTH)
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), rows)
    return dq, dk.astype(k_JBKSH.dtype), dv.astype(v_JBKSH.dtype), None


_attend.defvjp(_forward, _backward)
