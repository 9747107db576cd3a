"""Grouped matmul on GPUs by Pallas Triton kernels: only the rows that exist are multiplied, whatever the group sizes.

Rows are cut into tiles that never cross groups, so there are as many tiles as rows need and at most one more a group.
Rows behind the last group are a group without a matrix: their outputs and gradients are zeros. A group without rows
has a gradient of zeros. Nothing is read outside of the arrays, and weights are read as they lie, transposed in the
tile.

Letters beside the house's: X tiles of rows, I rows of a tile, J columns of a tile, C depth of a step.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


class Tile(NamedTuple):
    """What one program computes of the result, and how."""

    rows: int
    columns: int
    depth: int  # bytes of a step along what is summed
    warps: int
    stages: int  # fetched ahead


# Measured on an H200 (docs/performance.md): tiles of 128 x 128 and fewer stages are slower. Four stages of 48 KiB are
# what a Hopper streaming multiprocessor holds.
ROWS_TILE = 128
PRODUCT = Tile(ROWS_TILE, 256, 128, warps=8, stages=4)
GRADIENT = Tile(128, 256, 128, warps=8, stages=4)
FP32 = Tile(ROWS_TILE, 128, 128, warps=8, stages=4)
BAND = 8
"""Tiles of rows that go through the columns together, so that they share the weights in L2."""


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e] where row r lies in group e; rows behind the last group give zeros.

    Sums are fp32 (and so are products of fp32 inputs, not TF32); the result has x's dtype.
    """
    return _grouped_matmul(x_RD, w_EDF, group_sizes_E)


@jax.custom_vjp
def _grouped_matmul(x_RD, w_EDF, group_sizes_E):
    return _times_weights(x_RD, w_EDF, group_sizes_E, transposed=False)


def _forward(x_RD, w_EDF, group_sizes_E):
    return _grouped_matmul(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _backward(residuals, d_out_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _times_weights(d_out_RF, w_EDF, group_sizes_E, transposed=True)
    return dx_RD, _weights_gradient(x_RD, d_out_RF, group_sizes_E, w_EDF.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def row_tiles(group_sizes_E: Int[Array, "E"], rows: int) -> tuple[Int[Array, "X"], Int[Array, "X"], Int[Array, "X"]]:
    """Each tile's group (E: behind the last one), its first row, and the end of its group; first >= end: no tile."""
    behind_1 = rows - group_sizes_E.sum(keepdims=True)
    sizes = jnp.concatenate([group_sizes_E, behind_1]).astype(jnp.int32)
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(pl.cdiv(sizes, ROWS_TILE))
    tile_X = jnp.arange(rows // ROWS_TILE + len(sizes), dtype=jnp.int32)
    group_X = jnp.minimum(jnp.searchsorted(tile_ends, tile_X, side="right"), len(sizes) - 1).astype(jnp.int32)
    first_tile_X = (tile_ends - pl.cdiv(sizes, ROWS_TILE))[group_X]
    end_X = ends[group_X]
    return group_X, end_X - sizes[group_X] + (tile_X - first_tile_X) * ROWS_TILE, end_X


def _span(start, size: int, limit: int) -> jax.Array:
    """start .. start + size - 1, kept below `limit` where the tiles do not divide it."""
    span = start + jnp.arange(size, dtype=jnp.int32)
    return jnp.minimum(span, limit - 1) if limit % size else span


def _precision(dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _times_weights(x_RD, w, group_sizes_E, transposed: bool):
    """x[r] @ w[e], or x[r] @ w[e].T; D is what is summed over and F what comes out, whichever way w lies."""
    (R, D), E = x_RD.shape, w.shape[0]
    F = w.shape[1] if transposed else w.shape[2]
    tiles = row_tiles(group_sizes_E, R)
    tile = PRODUCT if x_RD.dtype.itemsize == 2 else FP32
    J, depth = tile.columns, tile.depth // x_RD.dtype.itemsize
    X, columns = len(tiles[0]), pl.cdiv(F, J)

    def kernel(group_ref, first_ref, end_ref, x_ref, w_ref, out_ref):
        band, place = jnp.divmod(pl.program_id(0), BAND * columns)
        in_band = jnp.minimum(X - band * BAND, BAND)
        run, column = band * BAND + place % in_band, place // in_band
        group, first, end = group_ref[run], first_ref[run], end_ref[run]
        row_I = first + jnp.arange(ROWS_TILE, dtype=jnp.int32)
        column_J = _span(column * J, J, F)

        @pl.when(first < end)
        def _():
            def step(i, sum_IJ):
                c_C = _span(i * depth, depth, D)
                x_IC = x_ref[jnp.minimum(row_I, R - 1)[:, None], c_C[None, :]]
                if D % depth:
                    x_IC = jnp.where((i * depth + jnp.arange(depth) < D)[None, :], x_IC, 0)
                if transposed:
                    w_CJ = w_ref[group, column_J[:, None], c_C[None, :]].T
                else:
                    w_CJ = w_ref[group, c_C[:, None], column_J[None, :]]
                return sum_IJ + plgpu.dot(x_IC, w_CJ, precision=_precision(x_ref.dtype))

            steps = pl.cdiv(D, depth) * (group < E).astype(jnp.int32)
            sum_IJ = jax.lax.fori_loop(0, steps, step, jnp.zeros((ROWS_TILE, J), jnp.float32))
            all_J = column * J + jnp.arange(J, dtype=jnp.int32)
            inside_IJ = (row_I < end)[:, None] & (all_J < F)[None, :]
            plgpu.store(out_ref.at[row_I[:, None], all_J[None, :]], sum_IJ.astype(out_ref.dtype), mask=inside_IJ)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, F), x_RD.dtype),
        grid=(X * columns,),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*tiles, x_RD, w)


def _weights_gradient(x_RD, g_RF, group_sizes_E, dtype):
    """x[rows of e].T @ g[rows of e] for each group e."""
    (R, D), F, E = x_RD.shape, g_RF.shape[1], len(group_sizes_E)
    tile = GRADIENT if x_RD.dtype.itemsize == 2 else FP32
    I, J, depth = tile.rows, tile.columns, tile.depth // x_RD.dtype.itemsize  # noqa: E741
    down, across = pl.cdiv(D, I), pl.cdiv(F, J)
    ends_E = jnp.cumsum(group_sizes_E).astype(jnp.int32)

    def kernel(first_ref, end_ref, x_ref, g_ref, out_ref):
        group, place = jnp.divmod(pl.program_id(0), down * across)
        band, place = jnp.divmod(place, BAND * across)
        in_band = jnp.minimum(down - band * BAND, BAND)
        i, j = band * BAND + place % in_band, place // in_band
        first, end = first_ref[group], end_ref[group]
        row_I, column_J = _span(i * I, I, D), _span(j * J, J, F)

        def step(s, sum_IJ, last: bool):
            c_C = first + s * depth + jnp.arange(depth, dtype=jnp.int32)
            within_C, c_C = (c_C < end)[:, None], (jnp.minimum(c_C, R - 1) if last else c_C)[:, None]
            x_CI, g_CJ = x_ref[c_C, row_I[None, :]], g_ref[c_C, column_J[None, :]]
            if last:
                x_CI, g_CJ = jnp.where(within_C, x_CI, 0), jnp.where(within_C, g_CJ, 0)
            return sum_IJ + plgpu.dot(x_CI.T, g_CJ, precision=_precision(x_ref.dtype))

        # What is masked goes through registers, and is not fetched ahead: so only what does not fill a step.
        whole, steps = (end - first) // depth, pl.cdiv(end - first, depth)
        sum_IJ = jax.lax.fori_loop(0, whole, partial(step, last=False), jnp.zeros((I, J), jnp.float32))
        sum_IJ = jax.lax.fori_loop(whole, steps, partial(step, last=True), sum_IJ)
        all_I, all_J = i * I + jnp.arange(I), j * J + jnp.arange(J)
        inside_IJ = (all_I < D)[:, None] & (all_J < F)[None, :]
        plgpu.store(out_ref.at[group, all_I[:, None], all_J[None, :]], sum_IJ.astype(dtype), mask=inside_IJ)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((E, D, F), dtype),
        grid=(E * down * across,),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="grouped_matmul_weights_gradient",
    )(ends_E - group_sizes_E, ends_E, x_RD, g_RF)
