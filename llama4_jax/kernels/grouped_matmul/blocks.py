"""Grouped matmul over blocks of rows: each block belongs to one group, whose matrix is gathered for it.

The form for CPUs, where XLA's `ragged_dot` multiplies every row with every matrix; it runs anywhere.

Letters beside the house's: X blocks, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = GROUP = 128
"""Rows of a block; R and every group must be padded to multiples of it."""


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    einsum: Callable[..., jax.Array] = jnp.einsum,
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e]; every group size and R are multiples of ROWS. Rows behind the last group are undefined."""
    blocks_XBD = x_RD.reshape(-1, ROWS, x_RD.shape[1])
    first_row_X = jnp.arange(blocks_XBD.shape[0]) * ROWS
    group_X = jnp.searchsorted(jnp.cumsum(group_sizes_E), first_row_X, side="right")
    w_XDF = w_EDF[jnp.minimum(group_X, w_EDF.shape[0] - 1)]
    return einsum("XBD,XDF->XBF", blocks_XBD, w_XDF).reshape(x_RD.shape[0], -1)
