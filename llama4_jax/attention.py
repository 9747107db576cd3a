"""iRoPE attention: chunk-local layers with RoPE, global layers without positions (NoPE)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.axes import CONTEXT, Execution, all_gather, axis_index, axis_size, param
from llama4_jax.config import ModelConfig
from llama4_jax.kernels.attention.api import attention, chunked_attention
from llama4_jax.layers import rms_normalise, rope_frequencies, rotate

Heads = tuple[jax.Array, jax.Array, jax.Array]
"""Queries [B, T, N, H], keys and values [B, T, K, H]."""


def attention_temperature(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 + attn_scale ln(1 + floor((p + 1) / floor_scale)), fp32, from integer positions.

    The division stays in integers: a float position blurs the steps at long context.
    """
    steps = (positions_BT + 1) // cfg.floor_scale
    return 1.0 + cfg.attn_scale * jnp.log1p(steps.astype(jnp.float32))


class Attention(nnx.Module):
    """Grouped-query attention of one layer. Kv head j serves query heads jG .. jG+G-1; scores are scaled by H^-1/2.

    Local layers: q, k rotated by RoPE, then (if `qk_norm`) a weightless RMS norm over H; a query sees the keys of
    its document's chunk up to itself. Global layers: neither; queries scaled by the temperature; causal.
    """

    def __init__(self, cfg: ModelConfig, local: bool, rngs: nnx.Rngs):
        D, N, K, H, std = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.init_std
        self.cfg, self.local = cfg, local
        self.wq_DNH = param(rngs, (D, N, H), ("embed", "heads", None), std)
        self.wk_DKH = param(rngs, (D, K, H), ("embed", "kv_heads", None), std)
        self.wv_DKH = param(rngs, (D, K, H), ("embed", "kv_heads", None), std)
        self.wo_NHD = param(rngs, (N, H, D), ("heads", None, "embed"), std / np.sqrt(2 * cfg.num_layers))

    def project(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], execution: Execution
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values, positions applied; what a key/value cache stores."""
        return self._place(self._project(x_BTD, execution), positions_BT, self.local)

    @jax.named_scope("projections")
    def _project(self, x_BTD, execution: Execution) -> Heads:
        weights = self.wq_DNH[...], self.wk_DKH[...], self.wv_DKH[...]
        heads = execution.einsum("BTD,DNH->BTNH", x_BTD, jnp.concatenate(weights, axis=1))  # one matmul for the three
        N, K = (w.shape[1] for w in weights[:2])
        return heads[:, :, :N], heads[:, :, N : N + K], heads[:, :, N + K :]

    def _place(self, heads: Heads, positions_BT, local: bool) -> Heads:
        q_BTNH, k_BTKH, v_BTKH = heads
        if local:
            frequencies = rope_frequencies(self.cfg.rope, self.cfg.head_dim)
            q_BTNH, k_BTKH = (rotate(x, positions_BT, frequencies) for x in (q_BTNH, k_BTKH))
            if self.cfg.qk_norm:
                q_BTNH, k_BTKH = (rms_normalise(x, self.cfg.norm_eps) for x in (q_BTNH, k_BTKH))
        elif self.cfg.temperature_tuning:
            scale_BT = attention_temperature(self.cfg, positions_BT)
            q_BTNH = (q_BTNH * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)
        return q_BTNH, k_BTKH, v_BTKH

    @jax.named_scope("projections")
    def output(self, out_BTNH: Float[Array, "B T N H"], execution: Execution) -> Float[Array, "B T D"]:
        """Heads back into the residual stream: this device's share over the tensor axis."""
        return execution.einsum("BTNH,NHD->BTD", out_BTNH, self.wo_NHD[...])

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution,
        local: Bool[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """`local`: whether to be a local layer, decided while running, for a loop over both kinds; None: as made."""

        def attend(as_local: bool, heads: Heads):
            with jax.named_scope("attention_local" if as_local else "attention_global"):
                placed = self._place(heads, positions_BT, as_local)
                return self._attend(placed, segment_ids_BT, execution, as_local)

        heads = self._project(x_BTD, execution)
        if local is None:
            return self.output(attend(self.local, heads), execution)
        if axis_size(CONTEXT) == 1 and x_BTD.shape[1] <= self.cfg.chunk:  # a row is a chunk: one kernel serves both
            with jax.named_scope("attention"):
                placed = jax.lax.cond(
                    local,
                    *(partial(self._place, positions_BT=positions_BT, local=kind) for kind in (True, False)),
                    heads,
                )
                out_BTNH = self._attend(placed, segment_ids_BT, execution, local=True)
        else:
            out_BTNH = jax.lax.cond(local, partial(attend, True), partial(attend, False), heads)
        return self.output(out_BTNH, execution)

    def attend(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution,
    ) -> Float[Array, "B T N H"]:
        """What the queries of whole rows gather: `project`'s result in, heads out.

        Rows lie contiguously over the context axis. Local layers of shards that hold whole chunks communicate nothing.
        """
        return self._attend((q_BTNH, k_BTKH, v_BTKH), segment_ids_BT, execution, self.local)

    def _attend(self, heads: Heads, segment_ids_BT, execution: Execution, local: bool):
        q_BTNH, k_BTKH, v_BTKH = heads
        chunk, backend = self.cfg.chunk, execution.attention
        if not local:
            return _EXCHANGES[execution.exchange](q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, backend)
        if axis_size(CONTEXT) == 1 or q_BTNH.shape[1] % chunk == 0:
            return chunked_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, chunk, backend=backend)
        # The shard cuts a chunk: the row's keys are gathered, and each chunk's part of a document is a segment.
        chunks = -(-q_BTNH.shape[1] * axis_size(CONTEXT) // chunk)
        pieces_BT = segment_ids_BT * chunks + (_row_positions(q_BTNH) // chunk)[None, :]
        return _gather(q_BTNH, k_BTKH, v_BTKH, pieces_BT, backend)


def _row_positions(q_BTNH) -> Int[Array, "T"]:
    """Where this device's part of the row stands in it."""
    T = q_BTNH.shape[1]
    return axis_index(CONTEXT) * T + jnp.arange(T)


def _gather(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, backend):
    """Keys and values are gathered; queries stay. Of causal work the last device has twice the mean."""
    if axis_size(CONTEXT) == 1:
        return attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT, backend=backend)
    k_BSKH, v_BSKH, segment_ids_BS = (all_gather(x, CONTEXT, dim=1) for x in (k_BTKH, v_BTKH, segment_ids_BT))
    return attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, segment_ids_BS, _row_positions(q_BTNH), backend=backend)


def _mirror(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, backend):
    """Keys and values are gathered, and devices i and c-1-i swap the second halves of their queries.

    Each then has an early half and a late one: the causal work of all is equal. A middle device swaps with itself.
    """
    c, half = axis_size(CONTEXT), -(-q_BTNH.shape[1] // 2)
    if c == 1:
        return _gather(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, backend)

    def swap(x):
        theirs = jax.lax.ppermute(x[:, half:], CONTEXT, [(i, c - 1 - i) for i in range(c)])
        return jnp.concatenate([x[:, :half], theirs], axis=1)

    k_BSKH, v_BSKH, segment_ids_BS = (all_gather(x, CONTEXT, dim=1) for x in (k_BTKH, v_BTKH, segment_ids_BT))
    positions_T = swap(_row_positions(q_BTNH)[None, :])[0]
    q_BTNH, q_segments_BT = swap(q_BTNH), swap(segment_ids_BT)
    return swap(attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, segment_ids_BS, positions_T, backend=backend))


def _heads(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, backend):
    """Each device exchanges its part of the row for its part of the heads, which see the whole row: plain causal.

    With fewer kv heads than devices, each is sent to the devices whose queries it serves.
    """
    c, N, K = axis_size(CONTEXT), q_BTNH.shape[2], k_BTKH.shape[2]
    if N % c or (K % c and c % K):
        fitting = [n for n in range(1, N + 1) if N % n == 0 and (K % n == 0 or n % K == 0)]
        nearest = min(fitting, key=lambda n: (abs(n - c), n))
        raise ValueError(
            f"exchange 'heads' cannot deal {N} query heads and {K} kv heads to mesh.context = {c}: the nearest is "
            f"mesh.context = {nearest}; 'gather' and 'mirror' take any"
        )

    def swap(x, to_heads: bool):
        split, concat = (2, 1) if to_heads else (1, 2)
        return jax.lax.all_to_all(x, CONTEXT, split_axis=split, concat_axis=concat, tiled=True) if c > 1 else x

    q_BSNH, k_BSKH, v_BSKH = (swap(x, True) for x in (q_BTNH, *(_repeat(x, c) for x in (k_BTKH, v_BTKH))))
    segment_ids_BS = all_gather(segment_ids_BT, CONTEXT, dim=1)
    return swap(attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, segment_ids_BS, backend=backend), False)


def _repeat(x_BTKH, c: int):
    return jnp.repeat(x_BTKH, max(1, c // x_BTKH.shape[2]), axis=2)


_EXCHANGES = {"gather": _gather, "mirror": _mirror, "heads": _heads}
