"""Matmuls in eight bits: the einsum of a projection or of an expert, with its operands quantised on the way.

For out = sum_k x_k w_k, each operand is divided by a scale of its own for every index that is not summed (a token of
x, an output column of w), rounded to eight bits, multiplied, and the scales are multiplied back in:

    s(x) = max_k |x_k| / top,   q(x) = round(x / s(x)),   out = s(x) s(w) sum_k q(x_k) q(w_k)

where `top` is the type's largest value (int8: 127.5, so that its last step is used; fp8: 448 forward). Both matmuls of
the backward pass are quantised too: the incoming gradient times the scale of the saved operand, anew along what is
summed there, against the eight bits that the forward pass saved. Rounding and scales pass gradients straight through
(Jacob et al., arXiv 1712.05877). fp8 is e4m3 forward and e5m2, with its wider range, for gradients (Micikevicius et
al., arXiv 2209.05433); int8 is int8 throughout. Scales come from the arrays at hand, and nothing is remembered.

Stored weights, the optimizer and what crosses the mesh stay as they are. Sums over a dimension that the mesh splits
(tokens, in a weight's gradient; heads and ffn over `tensor`) are quantised shard by shard, so there a mesh changes the
rounding. The arithmetic is qwix's (`dot_general_qt`), which is imported only where a model is quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llama4_jax.kernels.grouped_matmul.api import EINSUMS

Quant = Literal["none", "fp8", "int8"]
"""In the compute dtype; e4m3 and e5m2; int8."""
DTYPES = {"fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2), "int8": (jnp.int8, jnp.int8)}
"""Of operands in the forward pass, and of gradients that come in."""
DEVICES = {
    "fp8": ("NVIDIA H100", "NVIDIA H200", "TPU7x"),
    "int8": ("TPU v5 lite", "TPU v5e", "TPU v5p", "TPU v5", "TPU v6 lite", "TPU v6e"),
}
"""Beginnings of the kinds of devices that multiply these types faster than bf16; vendors' data sheets."""


def einsum(spec: str, x: jax.Array, w: jax.Array, quant: Quant) -> jax.Array:
    """`jnp.einsum(spec, x, w)`, differentiable in both, its products of eight bits unless `quant` is "none".

    Result and gradients have the operands' dtype. ImportError, in a line that says how to install it, without qwix.
    """
    if quant == "none":
        return jnp.einsum(spec, x, w)
    return jnp.einsum(spec, x, w, _dot_general=_dot_general(quant))


def check_grouped(quant: Quant, dispatch: str, grouped_matmul: str) -> None:
    """ValueError, in a line, for a backend of the experts' matmul that cannot be quantised; an einsum always can."""
    if quant != "none" and dispatch != "all_to_all" and grouped_matmul not in EINSUMS:
        raise ValueError(
            f"quant {quant} cannot go through grouped_matmul {grouped_matmul}, which dispatch {dispatch} uses: "
            f"dispatch all_to_all can be quantised everywhere, and of grouped matmuls {', '.join(EINSUMS)}"
        )


def check_device(quant: Quant, device: Any) -> None:
    """ValueError, in a line, for a device that gains nothing by it (a CPU emulates); ImportError without qwix."""
    if quant == "none":
        return
    kind = device.device_kind
    if device.platform != "cpu" and not kind.startswith(DEVICES[quant]):
        here = " and ".join(["none", *(other for other, kinds in DEVICES.items() if kind.startswith(kinds))])
        raise ValueError(
            f"quant {quant} is for {', '.join(DEVICES[quant])}, and a CPU emulates it; this is a {kind}: use {here}"
        )
    _dot_general(quant)


@cache  # one function for each type, so that what is compiled with it is found again
def _dot_general(quant: str) -> Callable[..., jax.Array]:
    """`jax.lax.dot_general` with quantised operands; operands may come in either order, as einsum likes."""
    try:
        from qwix._src.core import dot_general_qt as qwix  # the functions its providers patch into models
    except ImportError as error:
        raise ImportError(f"quant {quant} needs qwix ({error}): run pip install -e '.[quant]'") from error
    forward, backward = DTYPES[quant]
    config = qwix.DotGeneralQtConfig(
        lhs_qtype=forward, rhs_qtype=forward, dlhs_grad_qtype=backward, drhs_grad_qtype=backward
    )

    def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **_):
        return qwix.dot_general_qt(lhs, rhs, dimension_numbers, config)

    return dot_general
