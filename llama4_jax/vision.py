"""The vision tower: tiles of images to rows of the text model's embedding.

    x = LN(patches W ++ class + positions);   x += Attention(LN(x));   x += fc2 gelu(fc1 LN(x));   LN(x)
    tokens = gelu(gelu(merged A1) A2) Wp,  merged: each square of `shuffle` x `shuffle` patches as one vector

A tile is `image_size` pixels square. Its patches stand row by row and the class token stands last; it is dropped
behind the last norm. Every layer rotates queries and keys by where a patch stands: pairs of the first half of a head's
width by (column + 1) f_j, of the second by (row + 1) f_j, with f_j = theta^(-4j/H); the class token is not turned.
Attention is between all of a tile's patches, and between tiles there is none. GELU is exact. (Meta's `llama-models`
and `transformers`' Llama4VisionModel.)

Letters of this file, beside the house's:
  I tiles   C pixels of a patch, three colours each   P patches and the class token   D width of the tower   Q = N H
  M patches merged into a token   W their width together   A width of the adapter   O the same, behind it
  U width of the text model
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from llama4_jax.axes import CONTEXT, TENSOR, Execution, all_gather, param, psum
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.layers import turn

NORM_EPS = 1e-5
TILES_AT_ONCE = 8
"""Of which attention scores [N, P, P] live together."""


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias, in fp32, cast back to x's dtype."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        self.scale_D = param(rngs, (cfg.embed_dim,), ("tower",), std=None)
        self.bias_D = param(rngs, (cfg.embed_dim,), ("tower",), std=0.0)

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPS)
        scale, bias = (w[...].astype(jnp.float32)[None, None, :] for w in (self.scale_D, self.bias_D))
        return (x32 * scale + bias).astype(x.dtype)


def patch_angles(cfg: VisionConfig) -> np.ndarray:
    """Angles [P, H/2], fp32, by which each patch's pairs are turned; those of the class token, the last, are 0."""
    side, pairs = cfg.grid, cfg.head_dim // 4
    frequencies = (cfg.rope_theta ** (-np.arange(pairs) / pairs)).astype(np.float32)
    row, col = np.divmod(np.arange(side * side, dtype=np.float32), side)
    angles = np.concatenate([(where + 1)[:, None] * frequencies[None, :] for where in (col, row)], axis=1)
    return np.concatenate([angles, np.zeros((1, 2 * pairs), np.float32)])


class VisionLayer(nnx.Module):
    """x += Attention(LN(x)); x += fc2 gelu(fc1 LN(x)), all with biases."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        D, N, H, F, std = cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim, cfg.init_std
        self.cfg = cfg
        self.attention_norm, self.mlp_norm = LayerNorm(cfg, rngs), LayerNorm(cfg, rngs)
        self.wq_DNH = param(rngs, (D, N, H), ("tower", "heads", None), std)
        self.wk_DNH = param(rngs, (D, N, H), ("tower", "heads", None), std)
        self.wv_DNH = param(rngs, (D, N, H), ("tower", "heads", None), std)
        self.wo_NHD = param(rngs, (N, H, D), ("heads", None, "tower"), std / np.sqrt(2 * cfg.num_layers))
        # A bias is a vector, so heads are joined in it: what tells matrices from vectors counts dimensions.
        self.bq_Q, self.bk_Q, self.bv_Q = (param(rngs, (N * H,), ("heads",), std=0.0) for _ in range(3))
        self.bo_D = param(rngs, (D,), ("tower",), std=0.0)
        self.fc1_DF = param(rngs, (D, F), ("tower", "ffn"), std)
        self.fc1_bias_F = param(rngs, (F,), ("ffn",), std=0.0)
        self.fc2_FD = param(rngs, (F, D), ("ffn", "tower"), std / np.sqrt(2 * cfg.num_layers))
        self.fc2_bias_D = param(rngs, (D,), ("tower",), std=0.0)

    def __call__(self, x_IPD: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        x_IPD = x_IPD + psum(self._attention(self.attention_norm(x_IPD)), TENSOR) + self.bo_D[...][None, None, :]
        h_IPF = jnp.einsum("IPD,DF->IPF", self.mlp_norm(x_IPD), self.fc1_DF[...]) + self.fc1_bias_F[...][None, None, :]
        y_IPD = jnp.einsum("IPF,FD->IPD", jax.nn.gelu(h_IPF, approximate=False), self.fc2_FD[...])
        return x_IPD + psum(y_IPD, TENSOR) + self.fc2_bias_D[...][None, None, :]

    def _attention(self, x_IPD: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        """This device's share over the tensor axis."""
        weights = jnp.concatenate([self.wq_DNH[...], self.wk_DNH[...], self.wv_DNH[...]], axis=1)
        biases = jnp.concatenate([self.bq_Q[...], self.bk_Q[...], self.bv_Q[...]]).reshape(weights.shape[1:])
        heads = jnp.einsum("IPD,DNH->IPNH", x_IPD, weights) + biases[None, None]
        q_IPNH, k_IPNH, v_IPNH = jnp.split(heads, 3, axis=2)
        angles = patch_angles(self.cfg)[None, :, None, :]
        q_IPNH, k_IPNH = turn(q_IPNH, angles), turn(k_IPNH, angles)
        # Scores are formed again in the backward pass, here and not only where the layer is: a few tiles' at a time.
        out_IPNH = jax.lax.map(
            jax.checkpoint(lambda one: _attend(*one)), (q_IPNH, k_IPNH, v_IPNH),
            batch_size=min(TILES_AT_ONCE, x_IPD.shape[0]),
        )  # fmt: skip
        return jnp.einsum("IPNH,NHD->IPD", out_IPNH, self.wo_NHD[...])


def _attend(q_PNH: jax.Array, k_SNH: jax.Array, v_SNH: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v within a tile, scores in fp32."""
    scores_NPS = jnp.einsum("PNH,SNH->NPS", q_PNH, k_SNH, preferred_element_type=jnp.float32)
    weights_NPS = jax.nn.softmax(scores_NPS * q_PNH.shape[-1] ** -0.5, axis=-1).astype(v_SNH.dtype)
    return jnp.einsum("NPS,SNH->PNH", weights_NPS, v_SNH)


def to_patches(cfg: VisionConfig, tiles: UInt8[Array, "I Y X 3"]) -> Float[Array, "I P C"]:
    """Pixels 0..255 -> patches row by row, each flattened by colour, row and column, scaled to -1..1."""
    side, size = cfg.grid, cfg.patch_size
    x = tiles.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(-1, side * side, 3 * size * size).astype(jnp.float32) / 127.5 - 1


def merge_patches(cfg: VisionConfig, x_IPD: Float[Array, "I P D"]) -> Float[Array, "I M W"]:
    """Pixel shuffle: squares of `shuffle` x `shuffle` patches, row by row, each its patches' vectors row by row."""
    D, to, s = cfg.embed_dim, cfg.grid // cfg.shuffle, cfg.shuffle
    return x_IPD.reshape(-1, to, s, to, s, D).transpose(0, 1, 3, 2, 4, 5).reshape(-1, to * to, s * s * D)


class Adapter(nnx.Module):
    """gelu(gelu(x fc1) fc2), without biases: from merged patches to what the projector reads."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        W, A = cfg.shuffle**2 * cfg.embed_dim, cfg.adapter_dim
        self.fc1_WA = param(rngs, (W, A), (None, "embed"), cfg.init_std)
        self.fc2_AO = param(rngs, (A, A), (None, "embed"), cfg.init_std)

    def __call__(self, x_IMW: Float[Array, "I M W"]) -> Float[Array, "I M O"]:
        x_IMA = jax.nn.gelu(jnp.einsum("IMW,WA->IMA", x_IMW, self.fc1_WA[...]), approximate=False)
        return jax.nn.gelu(jnp.einsum("IMA,AO->IMO", x_IMA, self.fc2_AO[...]), approximate=False)


class Embedder(nnx.Module):
    """Patches to the tower's first residual stream: a linear map, the class token behind, positions, a norm."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        D, P = cfg.embed_dim, cfg.grid**2 + 1
        self.patch_CD = param(rngs, (3 * cfg.patch_size**2, D), (None, "tower"), cfg.init_std)
        self.class_D = param(rngs, (D,), ("tower",), D**-0.5)
        self.positions_PD = param(rngs, (P, D), ("positions", "tower"), D**-0.5)
        self.norm = LayerNorm(cfg, rngs)

    def __call__(self, patches_IPC: Float[Array, "I p C"]) -> Float[Array, "I P D"]:
        x_IPD = jnp.einsum("IPC,CD->IPD", patches_IPC.astype(self.patch_CD[...].dtype), self.patch_CD[...])
        of_class = jnp.broadcast_to(self.class_D[...], (x_IPD.shape[0], 1, x_IPD.shape[-1]))
        x_IPD = jnp.concatenate([x_IPD, of_class], axis=1) + self.positions_PD[...][None]
        return self.norm(x_IPD)


class Projector(nnx.Module):
    """From the adapter's width to the text model's, without a bias."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        assert cfg.vision is not None
        self.kernel_OU = param(rngs, (cfg.vision.adapter_dim, cfg.embed_dim), (None, "embed"), cfg.init_std)

    def __call__(self, x_IMO: Float[Array, "I M O"]) -> Float[Array, "I M U"]:
        return jnp.einsum("IMO,OU->IMU", x_IMO, self.kernel_OU[...])


class Vision(nnx.Module):
    """Tower, adapter and projector. Weights of the layers are stacked over them."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        assert cfg.vision is not None
        self.cfg = vision = cfg.vision
        self.embedder = Embedder(vision, rngs)
        keys = jax.random.split(rngs.params(), vision.num_layers)
        self.layers = nnx.vmap(lambda key: VisionLayer(vision, nnx.Rngs(params=key)))(keys)
        self.final_norm = LayerNorm(vision, rngs)
        self.adapter = Adapter(vision, rngs)
        self.projector = Projector(cfg, rngs)

    @jax.named_scope("vision")
    def __call__(self, tiles: UInt8[Array, "I Y X 3"], execution: Execution) -> Float[Array, "I M U"]:
        """Each tile's tokens, in the compute dtype; each layer is computed again in the backward pass, unless `remat`
        is `none`."""
        x_IPD = execution.fetch_module(self.embedder)(to_patches(self.cfg, tiles))
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(x_IPD, stored):
            return nnx.merge(graphdef, execution.fetch(stored))(x_IPD), None

        if execution.remat != "none":
            run_layer = jax.checkpoint(run_layer, prevent_cse=False)
        x_IPD, _ = jax.lax.scan(run_layer, x_IPD, stacked)
        x_IPD = execution.fetch_module(self.final_norm)(x_IPD)[:, :-1]
        x_IMO = execution.fetch_module(self.adapter)(merge_patches(self.cfg, x_IPD))
        return execution.fetch_module(self.projector)(x_IMO)

    def fuse(
        self,
        x_BTU: Float[Array, "B T U"],
        tiles_BJ: UInt8[Array, "B J Y X 3"],
        slots_BT: Int[Array, "B T"],
        execution: Execution,
    ) -> Float[Array, "B T U"]:
        """Early fusion: where a slot is not negative, the row's tile token of that number in place of the embedding.

        Slot s of a row is token s % M of its tile s // M. The tiles of a row lie split over the context axis as its
        tokens do; each device runs its own ones through the tower, and their tokens are gathered.
        """
        B, J = tiles_BJ.shape[:2]
        tokens = self(tiles_BJ.reshape(B * J, *tiles_BJ.shape[2:]), execution)
        with jax.named_scope("fusion"):
            rows_BSU = all_gather(tokens.reshape(B, -1, tokens.shape[-1]), CONTEXT, dim=1)
            seen_BTU = jnp.take_along_axis(rows_BSU, jnp.maximum(slots_BT, 0)[..., None], axis=1)
            return jnp.where(slots_BT[..., None] >= 0, seen_BTU.astype(x_BTU.dtype), x_BTU)


def is_vision(path: tuple[Any, ...]) -> bool:
    """Whether a weight, by its path in the model's state, is the vision part's."""
    return path[0] == "vision"


def is_projector(path: tuple[Any, ...]) -> bool:
    """Whether it is the projector's, the last part of it."""
    return path[:2] == ("vision", "projector")
