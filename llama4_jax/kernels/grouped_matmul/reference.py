"""Grouped matmul as the definition reads: every group's matrix on every row, the row's own kept."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e] where row r lies in group e; rows behind the last group give zeros."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_R = jnp.arange(x_RD.shape[0])
    starts_E = ends_E - group_sizes_E
    in_group_RE = (row_R[:, None] < ends_E[None, :]) & (row_R[:, None] >= starts_E[None, :])
    return jnp.einsum("RD,EDF,RE->RF", x_RD, w_EDF, in_group_RE.astype(x_RD.dtype))
