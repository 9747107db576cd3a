"""iRoPE attention: chunk-local layers with RoPE, global layers without positions (NoPE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.axes import CONTEXT, Execution, all_gather, axis_index, axis_size, param
from llama4_jax.config import ModelConfig
from llama4_jax.kernels.attention.api import chunked_attention, global_attention
from llama4_jax.layers import rms_normalise, rope_frequencies, rotate


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
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values, positions applied; what a key/value cache stores."""
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.wq_DNH[...])
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.wk_DKH[...])
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.wv_DKH[...])
        if self.local:
            frequencies = rope_frequencies(self.cfg.rope, self.cfg.head_dim)
            q_BTNH, k_BTKH = (rotate(x, positions_BT, frequencies) for x in (q_BTNH, k_BTKH))
            if self.cfg.qk_norm:
                q_BTNH, k_BTKH = (rms_normalise(x, self.cfg.norm_eps) for x in (q_BTNH, k_BTKH))
        elif self.cfg.temperature_tuning:
            scale_BT = attention_temperature(self.cfg, positions_BT)
            q_BTNH = (q_BTNH * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)
        return q_BTNH, k_BTKH, v_BTKH

    def output(self, out_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Heads back into the residual stream: this device's share over the tensor axis."""
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, self.wo_NHD[...])

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution,
    ) -> Float[Array, "B T D"]:
        with jax.named_scope("attention_local" if self.local else "attention_global"):
            q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, positions_BT)
            return self.output(self.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, execution))

    def attend(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution,
    ) -> Float[Array, "B T N H"]:
        """What the queries of whole rows gather: `project`'s result in, heads out."""
        attend = self._attend_local if self.local else self._attend_global
        return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    def _attend_global(self, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        """Rows lie contiguously over the context axis: each device's queries see the gathered keys and values."""
        k_BSKH, v_BSKH, segment_ids_BS = (all_gather(x, CONTEXT, dim=1) for x in (k_BTKH, v_BTKH, segment_ids_BT))
        start = axis_index(CONTEXT) * q_BTNH.shape[1]
        return global_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, segment_ids_BS, start)

    def _attend_local(self, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        """A context shard of whole chunks communicates nothing; one that cuts a chunk gathers the row first."""
        T = q_BTNH.shape[1]
        if T % self.cfg.chunk == 0 or axis_size(CONTEXT) == 1:
            return chunked_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, self.cfg.chunk)
        q_BSNH, k_BSKH, v_BSKH, segment_ids_BS = (
            all_gather(x, CONTEXT, dim=1) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        )
        out_BSNH = chunked_attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, self.cfg.chunk)
        return jax.lax.dynamic_slice_in_dim(out_BSNH, axis_index(CONTEXT) * T, T, axis=1)
