"""How routed tokens and experts meet: three dispatches behind one signature.

    dispatch(experts, x_QD, expert_Q, num_experts, execution) -> (y_QD, served_Q)

takes this device's Q = R A pairs of a token and one of its chosen experts, the rows already scaled by their gates, and
gives each pair's expert output, and whether it was served; a pair that was not gets zeros. `expert_Q` is E for
a pair that goes nowhere (padding), which is not served either.

* `fsdp`: every device holds all experts while it needs them (`Execution.fetch`) and serves its own pairs. Nothing is
  dropped, whatever the router does.
* `all_to_all`: the experts stay where they are stored, split over the expert axis. Each device fills a buffer of
  C = capacity Q / E rows an expert, the buffers change places, and each expert is one dense matmul. Static shapes, and
  pairs beyond C are dropped.
* `ragged_all_to_all`: the same exchange with as many rows as there are. Only a device's receive buffer is bounded, by
  capacity Q rows for all its experts together; what lies beyond is dropped.

With an expert axis of size 1 the last two exchange nothing; `all_to_all` is then plain capacity routing.

Letters beside the house's: Q pairs, C rows of an expert's buffer, S slots of sorted rows, X devices of the expert axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.axes import EXPERT, Execution, all_gather, axis_index, axis_size
from llama4_jax.kernels.grouped_matmul.api import group_multiple, grouped_matmul, rows_multiple

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
"""Rows, in whatever form a dispatch arranges them, with their experts' matrices [E, D, F]."""
ExpertsFn = Callable[[jax.Array, Matmul], jax.Array]
"""The experts' SwiGLU, given how rows meet a matrix."""


def fsdp(
    experts: ExpertsFn, x_QD: Float[Array, "Q D"], expert_Q: Int[Array, "Q"], num_experts: int, execution: Execution
) -> tuple[Float[Array, "Q D"], Bool[Array, "Q"]]:
    """All experts are here: sort by expert, each group padded to what the kernel takes, and back."""
    backend, einsum = execution.grouped_matmul, None if execution.quant == "none" else execution.einsum
    Q, multiple = x_QD.shape[0], group_multiple(backend)
    rank_Q, count_E = _rank(expert_Q, num_experts)
    padded_E = -(-count_E // multiple) * multiple
    start_E = jnp.cumsum(padded_E) - padded_E
    slots = -(-Q // multiple) * multiple + (num_experts * multiple if multiple > 1 else 0)
    slots = -(-slots // rows_multiple(backend)) * rows_multiple(backend)
    served_Q = expert_Q < num_experts
    slot_Q = jnp.where(served_Q, start_E[jnp.minimum(expert_Q, num_experts - 1)] + rank_Q, slots)
    pair_S = jnp.full(slots, Q, jnp.int32).at[slot_Q].set(jnp.arange(Q, dtype=jnp.int32), mode="drop")
    x_SD = _move(x_QD, pair_S, slot_Q)  # the empty slots hold zeros
    y_SD = experts(x_SD, lambda x_SD, w_EDF: grouped_matmul(x_SD, w_EDF, padded_E, backend, einsum))
    return _move(y_SD, slot_Q, pair_S), served_Q


def all_to_all(
    experts: ExpertsFn, x_QD: Float[Array, "Q D"], expert_Q: Int[Array, "Q"], num_experts: int, execution: Execution
) -> tuple[Float[Array, "Q D"], Bool[Array, "Q"]]:
    """A buffer of C rows for every expert from every device; C is a multiple of 8."""
    Q, E = x_QD.shape[0], num_experts
    C = min(-(-math.ceil(execution.capacity * Q / E) // 8) * 8, -(-Q // 8) * 8)
    rank_Q, _ = _rank(expert_Q, E)
    served_Q = (expert_Q < E) & (rank_Q < C)
    slot_Q = jnp.where(served_Q, expert_Q * C + rank_Q, E * C)
    pair_S = jnp.full(E * C, Q, jnp.int32).at[slot_Q].set(jnp.arange(Q, dtype=jnp.int32), mode="drop")
    x_ECD = _exchange(_move(x_QD, pair_S, slot_Q).reshape(E, C, -1), split=0, concat=1)
    y_ECD = experts(x_ECD, lambda x_ECD, w_EDF: execution.einsum("ECD,EDF->ECF", x_ECD, w_EDF))
    y_SD = _exchange(y_ECD, split=1, concat=0).reshape(E * C, -1)
    return _move(y_SD, slot_Q, pair_S), served_Q


def ragged_all_to_all(
    experts: ExpertsFn, x_QD: Float[Array, "Q D"], expert_Q: Int[Array, "Q"], num_experts: int, execution: Execution
) -> tuple[Float[Array, "Q D"], Bool[Array, "Q"]]:
    """Each device's sorted rows go to the devices of their experts, which serve them by `fsdp` among their own."""
    devices, me = axis_size(EXPERT), axis_index(EXPERT)
    Q, own = x_QD.shape[0], num_experts // devices
    room = min(math.ceil(execution.capacity * Q), devices * Q)
    rank_Q, count_E = _rank(expert_Q, num_experts)
    # By source and destination: rows wanted, where they start in the source's order and in the destination's buffer,
    # and how many of them still fit there.
    count_XE = all_gather(count_E[None], EXPERT, dim=0)
    wanted_XX = count_XE.reshape(devices, devices, own).sum(axis=2)
    start_XX = jnp.cumsum(wanted_XX, axis=1) - wanted_XX
    place_XX = jnp.minimum(jnp.cumsum(wanted_XX, axis=0) - wanted_XX, room)
    sent_XX = jnp.minimum(wanted_XX, room - place_XX)

    start_E = jnp.cumsum(count_E) - count_E
    to_Q = jnp.minimum(expert_Q, num_experts - 1)
    place_Q = start_E[to_Q] + rank_Q  # in this device's order
    served_Q = (expert_Q < num_experts) & (place_Q - start_XX[me][to_Q // own] < sent_XX[me][to_Q // own])

    move = partial(_ragged_exchange, emulate=execution.platform == "cpu")
    slot_Q = jnp.where(served_Q, place_Q, Q)
    pair_Q = jnp.full(Q, Q, jnp.int32).at[slot_Q].set(jnp.arange(Q, dtype=jnp.int32), mode="drop")
    x_SD = move(_move(x_QD, pair_Q, slot_Q), room, start_XX, place_XX, sent_XX)
    # Row s came from the source whose rows cover it; there it lies among the rows of this device's experts.
    slot_S, ends_X = jnp.arange(room), place_XX[:, me] + sent_XX[:, me]
    source_S = jnp.minimum(jnp.searchsorted(ends_X, slot_S, side="right"), devices - 1)
    mine_XE = jax.lax.dynamic_slice_in_dim(count_XE, me * own, own, axis=1)
    within_S = slot_S - place_XX[source_S, me]
    expert_S = (within_S[:, None] >= jnp.cumsum(mine_XE, axis=1)[source_S]).sum(axis=1)
    expert_S = jnp.where(slot_S < ends_X[-1], expert_S, own)
    y_SD, _ = fsdp(experts, x_SD, expert_S, own, execution)
    y_QD = move(y_SD, Q, place_XX.T, start_XX.T, sent_XX.T)
    return _move(y_QD, slot_Q, pair_Q), served_Q


DISPATCHES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    f.__name__: f for f in (fsdp, all_to_all, ragged_all_to_all)
}


def _rank(expert_Q: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Each pair's rank among the pairs of its expert, in their order, and the experts' counts [E]."""
    Q = expert_Q.shape[0]
    order_Q = jnp.argsort(expert_Q, stable=True)
    count_E = jnp.bincount(expert_Q, length=num_experts)  # those of no expert are not counted
    start_E = jnp.cumsum(count_E) - count_E
    place_Q = jnp.zeros(Q, jnp.int32).at[order_Q].set(jnp.arange(Q, dtype=jnp.int32), unique_indices=True)
    return place_Q - jnp.append(start_E, Q)[expert_Q], count_E


def _rows(x_QD: jax.Array, index_S: jax.Array) -> jax.Array:
    """x[index], zeros where the index lies behind the last row."""
    return x_QD.at[index_S].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _move(x_QD: jax.Array, pair_S: jax.Array, slot_Q: jax.Array) -> jax.Array:
    """Pairs into slots: out[s] = x[pair[s]]. `slot` is the inverse, so that the backward pass is a gather too."""
    return _rows(x_QD, pair_S)


_move.defvjp(lambda x, pair, slot: (_rows(x, pair), slot), lambda slot, g: (_rows(g, slot), None, None))


def _exchange(x: jax.Array, split: int, concat: int) -> jax.Array:
    return x if axis_size(EXPERT) == 1 else jax.lax.all_to_all(x, EXPERT, split, concat, tiled=True)


def _ragged_exchange(
    x_QD: jax.Array, room: int, start_XX: jax.Array, place_XX: jax.Array, sent_XX: jax.Array, emulate: bool
) -> jax.Array:
    """Rows start[s, d] .. + sent[s, d] of source s, to place[s, d] on destination d, in a buffer of `room` rows.

    XLA's CPU backend has no ragged all-to-all: there all rows are gathered, and each device picks its own.
    """
    devices, me = axis_size(EXPERT), axis_index(EXPERT)
    if emulate or devices == 1:
        x_XQD: Any = all_gather(x_QD[None], EXPERT, dim=0)
        slot_S, ends_X = jnp.arange(room), place_XX[:, me] + sent_XX[:, me]
        source_S = jnp.minimum(jnp.searchsorted(ends_X, slot_S, side="right"), devices - 1)
        row_S = source_S * x_QD.shape[0] + start_XX[source_S, me] + slot_S - place_XX[source_S, me]
        covered_S = (slot_S >= place_XX[source_S, me]) & (slot_S < ends_X[source_S])
        return _rows(x_XQD.reshape(-1, x_QD.shape[1]), jnp.where(covered_S, row_S, x_XQD.shape[0] * x_XQD.shape[1]))
    buffer_SD = jnp.zeros((room, x_QD.shape[1]), x_QD.dtype)
    sizes = (start_XX[me], sent_XX[me], place_XX[me], sent_XX[:, me])
    return jax.lax.ragged_all_to_all(x_QD, buffer_SD, *(s.astype(jnp.int32) for s in sizes), axis_name=EXPERT)
