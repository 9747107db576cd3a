"""Grouped matmul by megablox, JAX's Pallas kernel for TPUs: tiles of rows that know their group, exact work."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

ROWS = 512
"""R must be a multiple of this, the rows of a tile; groups may have any size."""
TILE = (ROWS, 512, 1024)
"""Rows, contracted and output columns of a tile. HBM traffic depends on the first and the last alone; 1024 contracted
columns move as much, and their kernels take half as long again to compile."""


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e], accumulated in fp32; rows behind the last group are undefined.

    `interpret` runs the kernel's steps one by one on any device: for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    def tiles(m: int, k: int, n: int) -> tuple[int, int, int]:
        return ROWS, min(TILE[1], k), min(TILE[2], n)

    def matmul(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
        return gmm(x_RD, w_EDF, group_sizes_E, x_RD.dtype, tiles, interpret=interpret)

    return matmul(x_RD, w_EDF)
