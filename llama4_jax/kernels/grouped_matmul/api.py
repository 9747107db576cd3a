"""Matmul of rows sorted by group with their group's matrix: the experts' matmul."""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Array, Float, Int

from llama4_jax.kernels.grouped_matmul import blocks, ragged, reference

BACKENDS: dict[str, ModuleType] = {"blocks": blocks, "ragged_dot": ragged, "reference": reference}


def rows_multiple(backend: str) -> int:
    """What group sizes must be multiples of under this backend."""
    return getattr(BACKENDS[backend], "ROWS", 1)


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"], backend: str
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e] for row r of group e, groups lying one behind the other in `group_sizes_E` rows each."""
    return BACKENDS[backend].grouped_matmul(x_RD, w_EDF, group_sizes_E)
