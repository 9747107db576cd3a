"""A step computed twice: hardware that computes wrongly now and then gives other bits, and no error.

The program has to be deterministic: on CPUs and TPUs it is, on GPUs with `--xla_gpu_deterministic_ops=true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data.batch import Batch
from training.state import TrainState
from training.step import StepFn


class OtherBits(FloatingPointError):
    """Two runs of one step gave different states."""


def rechecked(train_step: StepFn) -> StepFn:
    """`train_step`, computed twice from copies of one state; `OtherBits` names what differs, and on which devices of
    this process. Every process of the job raises, whoever computed wrongly."""

    def twice(state: TrainState, batch: Batch, targets: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        step = int(state.step) + 1
        copy = jax.tree.map(jnp.copy, state)
        first, _ = train_step(copy, batch, targets)
        second, metrics = train_step(state, batch, targets)
        flags = jax.device_get(_unequal(first, second))
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, x in _leaves(flags) if x]
        if names:
            raise OtherBits(
                f"step {step} gave other bits when it was computed again: {names[0]} and {len(names) - 1} more arrays "
                f"differ{_where(first, second)}. A device computes wrongly, or the program is not deterministic"
            )
        return second, metrics

    return twice


@jax.jit
def _unequal(a: Any, b: Any) -> Any:
    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return (jax.lax.bitcast_convert_type(x, kind) != jax.lax.bitcast_convert_type(y, kind)).any()

    return jax.tree.map(one, a, b)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _where(a: Any, b: Any) -> str:
    devices = {
        str(x.device)
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        for x, y in zip(left.addressable_shards, right.addressable_shards, strict=True)
        if bytes(jax.device_get(x.data)) != bytes(jax.device_get(y.data))
    }
    return f", on {', '.join(sorted(devices))}" if devices else ""
