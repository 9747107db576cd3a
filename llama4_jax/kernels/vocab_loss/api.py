"""The loss over the vocabulary, fused with the unembedding: cross-entropy with labels, a divergence from a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.vocab_loss import chunked
from llama4_jax.kernels.vocab_loss.comparison import KL, Comparison, Dense, Stats
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets

CHUNK = 1024
"""Rows at a time by default: 0.8 GiB of fp32 logits at a vocabulary of 202,048. Fewer would add to dW more often."""
WIDE = 2**17
"""Columns of a device from which a live teacher's rows are half as many at a time: both models' logits and what is
made of them take 1.2 GiB at a vocabulary of 202,048 in place of 2.3 (docs/performance.md)."""


def vocab_loss(
    h_RD: Float[Array, "R D"],
    w_DV: Float[Array, "D V"],
    labels_R: Int[Array, "R"],
    hard_R: Float[Array, "R"],
    soft_R: Float[Array, "R"] | None = None,
    teacher: Dense | SparseTargets | None = None,
    comparison: Comparison = KL,
    toward: Float[Array, ""] | None = None,
    chunk: int | None = None,
    columns: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Stats]:
    """sum_i hard_i CE_i + soft_i g_i t^2 D_i over rows i, and statistics of each row.

    CE_i = logsumexp(z_i) - z_i[label_i] with z = h W in fp32; `comparison` says D and g (t^2 keeps gradients' size).
    `toward`, in [0, 1], puts softmax((1-toward) z/t + toward z_teacher/t), student's part a constant, in the place
    of the teacher's distribution in D (TAID: Shing et al., arXiv 2501.16937).
    Sparse targets suit kl at temperature 1 without `toward` and disagreement: D = KL estimated from the entropy that
    they carry (unbiased where they are), or that of the distribution with the tail as one bucket.
    Differentiable in `h` and `w`; all else is constant. Exact: equal to `reference` but for rounding.

    `columns`: the mesh axes over which the columns of both unembeddings are split, the last fastest (labels stay
    global ids); the loss returned is then this device's share, and the shares sum to it. `rows`: those of them along
    which devices have rows of their own, all of which meet all columns. `chunk`: a device's rows at a time
    (`default_chunk`), times as many as `rows` has devices.
    """
    if (teacher is None) != (soft_R is None):
        raise ValueError("a teacher and soft weights go together")
    if isinstance(teacher, SparseTargets):
        check_sparse(comparison, toward is not None)
    R = h_RD.shape[0]
    chunk = min(chunk or default_chunk(w_DV.shape[1], isinstance(teacher, Dense)), R)
    unembedding = teacher.unembedding if isinstance(teacher, Dense) else None
    taught = teacher.hidden if isinstance(teacher, Dense) else teacher
    targets = chunked.Targets(labels_R, hard_R, soft_R, taught)
    if padding := -R % chunk:  # rows that weigh nothing

        def pad(x):
            return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

        h_RD, targets = pad(h_RD), jax.tree.map(pad, targets)
    given = jax.lax.stop_gradient((targets, unembedding, toward))
    out: tuple[jax.Array, Stats] = chunked.loss(  # pyright: ignore[reportAssignmentType]
        h_RD, w_DV, *given, comparison, chunk, chunked.Split(columns, rows)
    )
    return out[0], jax.tree.map(lambda x: jax.lax.stop_gradient(x[:R]), out[1])


def default_chunk(columns: int, live_teacher: bool) -> int:
    """Rows at a time where a device has so many columns."""
    return CHUNK // 2 if live_teacher and columns >= WIDE else CHUNK


def check_sparse(comparison: Comparison, interpolated: bool) -> None:
    """ValueError for what a few entries of the teacher's distribution cannot tell."""
    if comparison.kind != "kl" or comparison.temperature != 1:
        raise ValueError(
            f"sparse targets hold a few of the teacher's probabilities, at temperature 1: enough for kl alone, "
            f"not for {comparison.kind} at temperature {comparison.temperature:g}"
        )
    if interpolated or comparison.focus == "disagreement":
        what = "interpolation" if interpolated else "focus disagreement"
        raise ValueError(f"{what} needs the teacher's whole distribution, which sparse targets do not hold")
