"""The text model: layers, and the transformer scanned over one period of the layer pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt8

from llama4_jax.attention import Attention
from llama4_jax.axes import TENSOR, Execution, psum, undrawn
from llama4_jax.config import LayerKind, ModelConfig
from llama4_jax.kernels.attention.api import RESIDUALS as ATTENTION
from llama4_jax.layers import Embedding, RMSNorm, SwiGLU, Unembedding
from llama4_jax.moe import MoE, RouterStats
from llama4_jax.vision import Vision

INPUT = "input"
"""Name of what a recomputed part is recomputed from."""


class Layer(nnx.Module):
    """x += Attention(norm(x)); x += FFN(norm(x)), the feed-forward part dense or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg, rngs)
        self.attention = Attention(cfg, kind.local, rngs)
        self.ffn_norm = RMSNorm(cfg, rngs)
        self.ffn = MoE(cfg, rngs) if kind.moe else SwiGLU(cfg, cfg.dense_dim, rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution,
        local: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """`local`: of attention, where it is decided while running (`Attention`)."""
        h_BTD = self.attention_norm(x_BTD)
        x_BTD += psum(self.attention(h_BTD, positions_BT, segment_ids_BT, execution, local), TENSOR)
        y_BTD, stats = self.feed_forward(self.ffn_norm(x_BTD), segment_ids_BT, execution)
        return x_BTD + psum(y_BTD, TENSOR), stats

    def feed_forward(
        self, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"], execution: Execution
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Shares over the tensor axis, and the router's statistics where there is one."""
        if isinstance(self.ffn, MoE):
            return self.ffn(x_BTD, (segment_ids_BT > 0).astype(jnp.float32), execution)
        with jax.named_scope("dense"):
            return self.ffn(x_BTD, execution), None


class Block(nnx.Module):
    """One period of the layer pattern: what the scan runs over."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(cfg, kind, rngs) for kind in cfg.pattern])


class Output(NamedTuple):
    """What a model hands to an objective: never logits."""

    hidden: Float[Array, "B T D"]  # after the final norm
    unembedding: Float[Array, "D V"]  # this device's columns of the vocabulary, in the compute dtype
    router: RouterStats  # stacked over MoE layers (a period has at least one); this device's sums


class Transformer(nnx.Module):
    """Embedding, the layers, final norm, unembedding. Weights of the layers are stacked over blocks."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = Embedding(cfg, rngs)
        keys = jax.random.split(rngs.params(), cfg.num_blocks)
        self.blocks = nnx.vmap(lambda key: Block(cfg, nnx.Rngs(params=key)))(keys)
        self.final_norm = RMSNorm(cfg, rngs)
        self.unembedding = Unembedding(cfg, rngs)
        self.vision = Vision(cfg, rngs) if cfg.vision else None

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        tiles_BJ: UInt8[Array, "B J Y X 3"] | None = None,
        slots_BT: Int[Array, "B T"] | None = None,
    ) -> Output:
        """`positions_BT`: place in the document; `segment_ids_BT`: 1.. by document, 0 for padding; chunk-aligned.

        `tiles_BJ`: pixels of a row's tiles, and `slots_BT`: where their tokens go (`Vision.fuse`); None: text alone.
        """
        with jax.named_scope("embedding"):
            x_BTD = execution.fetch_module(self.embedding)(tokens_BT)
        if tiles_BJ is not None:
            if self.vision is None or slots_BT is None:
                raise ValueError("tiles need a model with a vision tower (model.vision), and slots for their tokens")
            x_BTD = self.vision.fuse(x_BTD, tiles_BJ, slots_BT, execution)
        graphdef, stacked = nnx.split(self.blocks)
        every_layer = execution.remat in ("attention", "layer", "nested")  # is recomputed by itself
        block_too = execution.remat in ("block", "nested")

        def run_alike(x_BTD, layers: list[Layer], kinds: tuple[LayerKind, ...]):
            """Neighbours with weights of the same shapes: a loop, which is compiled once."""
            graph = nnx.split(layers[0])[0]

            def run_layer(x_BTD, one):
                stored, local = one
                # Fetched inside what is recomputed, so that one layer's weights live at a time.
                layer = execution.fetch_module(nnx.merge(graph, stored))
                x_BTD = x_BTD if block_too else checkpoint_name(x_BTD, INPUT)
                return layer(x_BTD, positions_BT, segment_ids_BT, execution, local)

            if every_layer:
                # Outside a loop, in a block that is recomputed itself, XLA would merge the two forward passes.
                run_layer = jax.checkpoint(run_layer, prevent_cse=len(layers) == 1, policy=_kept(execution))
            states = [nnx.split(layer)[1] for layer in layers]
            if len(layers) > 1:
                local_L = None if len(set(kinds)) == 1 else jnp.asarray([kind.local for kind in kinds])
                return jax.lax.scan(run_layer, x_BTD, (jax.tree.map(lambda *w: jnp.stack(w), *states), local_L))
            x_BTD, stats = run_layer(x_BTD, (states[0], None))
            return x_BTD, jax.tree.map(lambda s: s[None], stats)

        def run_block(x_BTD, stored):
            x_BTD = checkpoint_name(x_BTD, INPUT) if block_too else x_BTD
            layers, all_stats = list(nnx.merge(graphdef, stored).layers), []
            for first, last in neighbours(self.cfg.pattern, execution.remat):
                with jax.named_scope(f"layer_{first}" if first == last else f"layers_{first}_{last}"):
                    part = slice(first, last + 1)
                    x_BTD, stats = run_alike(x_BTD, layers[part], self.cfg.pattern[part])
                all_stats += [stats] if stats is not None else []
            return x_BTD, jax.tree.map(lambda *s: jnp.concatenate(s), *all_stats)

        if block_too:
            run_block = jax.checkpoint(run_block, prevent_cse=False, policy=_kept(execution))
        x_BTD, stats = jax.lax.scan(run_block, x_BTD, stacked)
        # [blocks, MoE layers of a block, ...] -> [MoE layers, ...]
        stats = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)
        with jax.named_scope("final_norm"):
            x_BTD = execution.fetch_module(self.final_norm)(x_BTD)
        return Output(x_BTD, execution.fetch_module(self.unembedding).kernel_DV[...], stats)

    def logits(
        self,
        tokens_BT: Int[Array, "B T"],
        execution: Execution = Execution(),  # noqa: B008
        tiles_BJ: UInt8[Array, "B J Y X 3"] | None = None,
        slots_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """fp32 logits of whole documents, one a row, unpadded: for tests, verification and small evaluations."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        out = self(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), execution, tiles_BJ, slots_BT)
        return jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding, preferred_element_type=jnp.float32)


def _kept(execution: Execution) -> Callable[..., Any]:
    """What a recomputed part keeps for the backward pass: its input, here or on the host, and perhaps attention's."""
    policies = jax.checkpoint_policies
    names = [ATTENTION] if execution.remat == "attention" else []
    if not execution.offload:
        return policies.save_only_these_names(*names)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names, names_which_can_be_offloaded=[INPUT], offload_src="device",
        offload_dst="pinned_host",
    )  # fmt: skip


def neighbours(pattern: tuple[LayerKind, ...], remat: str) -> list[tuple[int, int]]:
    """First and last of each run of layers that may share a loop.

    Under remat `layer` and `nested`, those with weights of the same shapes: the loop chooses between both kinds of
    attention as it runs. What a choice saves for the backward pass it saves for both, so where attention is saved
    layers are of one kind throughout; and where nothing is recomputed layer by layer, each goes by itself.
    """
    together = {"layer": lambda kind: kind.moe, "nested": lambda kind: kind.moe, "attention": lambda kind: kind}
    alike = together.get(remat, lambda _: object())
    firsts = [i for i, kind in enumerate(pattern) if not (i and alike(kind) == alike(pattern[i - 1]))]
    return list(zip(firsts, [*(i - 1 for i in firsts[1:]), len(pattern) - 1], strict=True))


def abstract(cfg: ModelConfig) -> Transformer:
    """The model with shapes in place of arrays: nothing is allocated, whatever the size."""
    with undrawn():
        return nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
