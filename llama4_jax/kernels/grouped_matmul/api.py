"""Matmul of rows sorted by group with their group's matrix: the experts' matmul."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import jax
from jaxtyping import Array, Float, Int

BACKENDS = ("blocks", "megablox", "triton", "reference")
"""Modules of this package: any platform, TPU, GPU, the truth. Each may name what it asks of its caller: GROUP, what
group sizes are multiples of, and ROWS, what R is a multiple of (1 where it names nothing)."""
EINSUMS = ("blocks",)
"""Those that multiply by one einsum of two operands."""


def _module(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise ValueError(f"no grouped matmul {backend!r}: there are {', '.join(BACKENDS)}")
    return import_module(f"{__package__}.{backend}")


def group_multiple(backend: str) -> int:
    """What group sizes must be multiples of under this backend."""
    return getattr(_module(backend), "GROUP", 1)


def rows_multiple(backend: str) -> int:
    """What R must be a multiple of under this backend."""
    return getattr(_module(backend), "ROWS", 1)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    backend: str,
    einsum: Callable[..., jax.Array] | None = None,
) -> Float[Array, "R F"]:
    """out[r] = x[r] @ w[e] for row r of group e, groups lying one behind the other in `group_sizes_E` rows each.

    Rows behind the last group are undefined, and so are their gradients. `einsum` multiplies in place of `jnp.einsum`
    (quantised, say) in the backends that are one; ValueError from the others.
    """
    if einsum is None:
        return _module(backend).grouped_matmul(x_RD, w_EDF, group_sizes_E)
    if backend not in EINSUMS:
        raise ValueError(f"grouped matmul {backend!r} is no einsum, to be given another: {', '.join(EINSUMS)} is one")
    return _module(backend).grouped_matmul(x_RD, w_EDF, group_sizes_E, einsum)
