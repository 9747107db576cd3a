"""The parts every layer shares: RMS norm, rotary embedding, SwiGLU, token embedding and unembedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.axes import EXPERT, TENSOR, VOCAB_AXES, Execution, all_gather, axis_index, param, psum, psum_scatter
from llama4_jax.config import ModelConfig, Rope


def rms_normalise(x: Float[Array, "*shape"], eps: float) -> Float[Array, "*shape"]:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, cast back to x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """rms_normalise(x) * scale: normalise in fp32, cast down, then multiply (Llama's order)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.scale_D = param(rngs, (cfg.embed_dim,), ("embed",), std=None)
        self.eps = cfg.norm_eps

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_normalise(x_BTD, self.eps) * self.scale_D[None, None, :]


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies [H/2], fp32: w_i = theta^(-2i/H), the slow ones divided by `factor` (Llama 3's scaling).

    With wavelength l = 2 pi / w: l < original/high keeps w; l > original/low gets w/factor; between them
    s = (original/l - low) / (high - low) and (1 - s) w/factor + s w. For Scout (16/1/1) the middle band is empty.
    """
    w = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    w = w.astype(np.float32)
    if rope.factor == 1:
        return w
    wavelength = 2 * np.pi / w
    s = (rope.original / wavelength - rope.low) / max(rope.high - rope.low, 1e-9)
    middle = (1 - s) * w / rope.factor + s * w
    scaled = np.where(wavelength > rope.original / rope.low, w / rope.factor, middle)
    return np.where(wavelength < rope.original / rope.high, w, scaled).astype(np.float32)


def rotate(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], frequencies: np.ndarray
) -> Float[Array, "B T N H"]:
    """Rotary embedding on *interleaved* pairs: (x_2i, x_2i+1) turned by the angle p w_i, in fp32."""
    return turn(x_BTNH, positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :])


def turn(x_BTNH: Float[Array, "B T N H"], angle: Float[Array, "b t n h"] | np.ndarray) -> Float[Array, "B T N H"]:
    """Pairs (x_2i, x_2i+1) turned by the angles [.., H/2], in fp32."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)
    even, odd = x[..., 0], x[..., 1]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return out.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def swiglu(matmul: Callable[[jax.Array, jax.Array], jax.Array], x, gate_DF, up_DF, out_FD) -> jax.Array:
    """(silu(x Wg) * (x Wu)) Wo for weights [..., D, F] and [..., F, D]; both inputs' products are one matmul."""
    gate, up = jnp.split(matmul(x, jnp.concatenate([gate_DF, up_DF], axis=-1)), 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, out_FD)


class SwiGLU(nnx.Module):
    """(silu(x Wg) * (x Wu)) Wo, without biases. Returns this device's share over the tensor axis."""

    def __init__(self, cfg: ModelConfig, ffn_dim: int, rngs: nnx.Rngs):
        D, std = cfg.embed_dim, cfg.init_std
        self.wi_gate_DF = param(rngs, (D, ffn_dim), ("embed", "ffn"), std)
        self.wi_up_DF = param(rngs, (D, ffn_dim), ("embed", "ffn"), std)
        self.wo_FD = param(rngs, (ffn_dim, D), ("ffn", "embed"), std / np.sqrt(2 * cfg.num_layers))

    def __call__(self, x: Float[Array, "*rows D"], execution: Execution) -> Float[Array, "*rows D"]:
        matmul = partial(execution.einsum, "...D,DF->...F")
        return swiglu(matmul, x, self.wi_gate_DF[...], self.wi_up_DF[...], self.wo_FD[...])


class Embedding(nnx.Module):
    """Token embedding: rows of a table [V, D], not scaled."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.table_VD = param(rngs, (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed"), cfg.init_std)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = self.table_VD[...]
        # The vocabulary may be split: each device looks up the ids it has, for all devices along the expert axis.
        ids = all_gather(tokens_BT, EXPERT, dim=0) - axis_index(VOCAB_AXES) * table_VD.shape[0]
        mine = (ids >= 0) & (ids < table_VD.shape[0])
        rows = jnp.where(mine[..., None], table_VD[jnp.where(mine, ids, 0)], 0)
        return psum(psum_scatter(rows, EXPERT, dim=0), TENSOR)


class Unembedding(nnx.Module):
    """The output head [D, V]; the loss takes it whole, so that no one forms [B, T, V] (`kernels/vocab_loss`)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.kernel_DV = param(rngs, (cfg.embed_dim, cfg.vocab_size), ("embed", "vocab"), cfg.init_std)
