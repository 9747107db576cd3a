"""The loss over the vocabulary, fused with the unembedding: cross-entropy with labels, forward KL with a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.vocab_loss import chunked

CHUNK = 1024
"""Rows at a time by default: 0.8 GiB of fp32 logits at a vocabulary of 202,048. Fewer would add to dW more often."""


def vocab_loss(
    h_RD: Float[Array, "R D"],
    w_DV: Float[Array, "D V"],
    labels_R: Int[Array, "R"],
    hard_R: Float[Array, "R"],
    soft_R: Float[Array, "R"] | None = None,
    teacher: tuple[Float[Array, "R U"], Float[Array, "U V"]] | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    columns: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, "R"], Float[Array, "R"]]:
    """sum_i hard_i CE_i + soft_i t^2 KL_i over rows i, and CE and KL of each row (constants to autodiff), in nats.

    CE_i = logsumexp(z_i) - z_i[label_i] with z = h W in fp32, and KL_i = sum_v p_v (log p_v - log q_v) with
    p = softmax(teacher's z / t), q = softmax(z / t) (Hinton et al., arXiv 1503.02531; t^2 keeps the gradient's size).
    Differentiable in `h` and `w`; weights and teacher are constants. Exact: equal to `reference` but for rounding.

    `columns`: the mesh axes over which the columns of both unembeddings are split, the last fastest (labels stay
    global ids); the loss returned is then this device's share, and the shares sum to it. `rows`: those of them along
    which devices have rows of their own, all of which meet all columns. `chunk`: a device's rows at a time, times as
    many as `rows` has devices.
    """
    if (teacher is None) != (soft_R is None):
        raise ValueError("a teacher and soft weights go together")
    R = h_RD.shape[0]
    chunk = min(chunk, R)
    teacher_RU, teacher_UV = teacher or (None, None)
    targets = chunked.Targets(labels_R, hard_R, soft_R, teacher_RU, teacher_UV)
    if padding := -R % chunk:  # rows that weigh nothing

        def pad(x):
            return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

        h_RD = pad(h_RD)
        targets = jax.tree.map(pad, targets._replace(teacher_UV=None))._replace(teacher_UV=targets.teacher_UV)
    targets = jax.lax.stop_gradient(targets)
    losses: tuple[jax.Array, jax.Array, jax.Array] = chunked.loss(  # pyright: ignore[reportAssignmentType]
        h_RD, w_DV, targets, temperature, chunk, chunked.Split(columns, rows)
    )
    share, ce_R, kl_R = losses
    return share, jax.lax.stop_gradient(ce_R[:R]), jax.lax.stop_gradient(kl_R[:R])
