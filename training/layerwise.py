"""The model run one layer at a time, by this project, by transformers and by the NumPy oracle: a layer's weights are
read, used, and gone before the next one's, so that a model need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from llama4_jax import hf, hf_vision
from llama4_jax.axes import Execution
from llama4_jax.layers import RMSNorm
from llama4_jax.moe import MoE
from llama4_jax.text import Layer
from llama4_jax.vision import Vision
from training import oracle
from training.hf_import import open_folder
from training.weights import FolderWeights, Weights


class Stage(NamedTuple):
    """What the residual stream holds behind a part of the model."""

    name: str
    x_BTD: np.ndarray
    router_RE: np.ndarray | None = None  # the router's logits, where there is one


@runtime_checkable
class Model(Protocol):
    """`stages` first: the embedding, each layer, the final norm; then `logits` of some columns of the vocabulary."""

    def stages(self, ids_BT: np.ndarray) -> Iterator[Stage]: ...

    def logits(self, first: int, last: int) -> np.ndarray: ...


class Ours:
    """This project's layers in fp32, with weights of any kind of checkpoint."""

    def __init__(self, weights: Weights):
        self._weights, self._cfg = weights, weights.cfg

    def stages(self, ids_BT: np.ndarray) -> Iterator[Stage]:
        cfg = self._cfg
        unique, places = np.unique(ids_BT, return_inverse=True)
        rows = [self._weights.read(("embedding", "table_VD"), (), {"V": (int(i), int(i) + 1)}) for i in unique]
        x_BTD = np.concatenate(rows)[places.reshape(ids_BT.shape)]
        yield Stage("embedding", x_BTD)
        for number in range(cfg.num_layers):
            block, i = divmod(number, cfg.period)
            graphdef, paths = self._layer(i)
            flat = [(path, self._weights.read(("blocks", "layers", i, *path), (block,))) for path in paths]
            state = nnx.from_flat_state([(p, nnx.Param(w, axes=paths[p][0], fp32=paths[p][1])) for p, w in flat])
            x, z_RE = _run(graphdef, state, x_BTD)
            x_BTD = np.asarray(x)
            yield Stage(f"layer {number}", x_BTD, None if z_RE is None else np.asarray(z_RE))
        norm = nnx.eval_shape(lambda: RMSNorm(cfg, nnx.Rngs(0)))
        graphdef, state = nnx.split(norm)
        scale = self._weights.read(("final_norm", "scale_D"))
        state = jax.tree.map(lambda _: jnp.asarray(scale), state)
        self._hidden = np.asarray(nnx.merge(graphdef, state)(jnp.asarray(x_BTD)))
        yield Stage("final norm", self._hidden)

    @cache  # noqa: B019
    def _layer(self, i: int) -> tuple[Any, dict[tuple, tuple[Any, bool]]]:
        layer = nnx.eval_shape(lambda: Layer(self._cfg, self._cfg.pattern[i], nnx.Rngs(0)))
        graphdef, state = nnx.split(layer)
        return graphdef, {path: (p.axes, p.fp32) for path, p in nnx.to_flat_state(state)}

    def logits(self, first: int, last: int) -> np.ndarray:
        kernel_DV = self._weights.read(("unembedding", "kernel_DV"), (), {"V": (first, last)})
        return self._hidden @ kernel_DV


@jax.jit(static_argnames="graphdef")
def _run(graphdef, state, x_BTD):
    """A layer on whole documents, one a row; and its router's logits."""
    with jax.default_matmul_precision("highest"):
        layer: Layer = nnx.merge(graphdef, state)
        ones_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        x_BTD = x_BTD + layer.attention(layer.attention_norm(x_BTD), positions_BT, ones_BT, Execution())
        h_BTD = layer.ffn_norm(x_BTD)
        z_RE = None
        if isinstance(layer.ffn, MoE):
            z_RE = h_BTD.reshape(-1, h_BTD.shape[-1]) @ layer.ffn.router_DE[...]
        return x_BTD + layer.feed_forward(h_BTD, ones_BT, Execution())[0], z_RE


class Numpy:
    """The oracle, from the folder's own tensors; those that are in another form are put together first."""

    def __init__(self, folder: FolderWeights):
        self._theirs = Theirs(folder)

    def stages(self, ids_BT: np.ndarray) -> Iterator[Stage]:
        config = hf.config_to_hf(self._theirs.cfg)  # settings in one spelling
        for name, x_BTD, router_RE in oracle.stages(config, self._theirs.tensor, ids_BT):
            self._hidden = x_BTD
            yield Stage(name, x_BTD, router_RE)

    def logits(self, first: int, last: int) -> np.ndarray:
        return self._hidden @ self._theirs.tensor("lm_head.weight", (first, last)).T


class Theirs:
    """A folder's tensors under the names and in the layouts of `Llama4ForCausalLM`, fp32.

    Where the folder has them so they are taken from it as they are, by name; experts apart, and quantised weights, go
    through `llama4_jax/hf.py`.
    """

    def __init__(self, weights: FolderWeights):
        self._weights, self.cfg = weights, weights.cfg
        self._table = {t.name: t for t in hf.tensors(self.cfg)}
        self._prefix = hf.TEXT_PREFIX if weights.folder.table[0].name.startswith(hf.TEXT_PREFIX) else ""

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        stored = self._weights.folder.stored.get(self._prefix + name)
        if stored is not None:
            return (stored.whole() if rows is None else stored.read(*rows)).astype(np.float32)
        t = self._table[name]
        return t.to_hf(*(self._weights.read(path, t.index) for path in t.paths))

    def of_layer(self, number: int) -> dict[str, np.ndarray]:
        """The layer's tensors by their names within it."""
        start = f"model.layers.{number}."
        return {name.removeprefix(start): self.tensor(name) for name in self._table if name.startswith(start)}


class Transformers:
    """The layers of `Llama4ForCausalLM`, eager attention, fp32, on the CPU."""

    def __init__(self, folder: FolderWeights):
        """ValueError where transformers or torch is not installed."""
        try:
            import torch  # pyright: ignore[reportMissingImports]
            from transformers import Llama4TextConfig  # pyright: ignore[reportMissingImports]
            from transformers.models.llama4 import modeling_llama4  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"this needs transformers and torch: install the extra [verify], or compare --against numpy ({error})"
            ) from None
        self._torch, self._code, self._theirs = torch, modeling_llama4, Theirs(folder)
        settings: dict[str, Any] = hf.config_to_hf(folder.cfg)
        settings = {k: v for k, v in settings.items() if k not in ("architectures", "model_type")}
        make: Any = Llama4TextConfig
        self._config = make(**settings, attn_implementation="eager")

    def stages(self, ids_BT: np.ndarray) -> Iterator[Stage]:
        torch, code, config = self._torch, self._code, self._config
        with torch.no_grad():
            unique, places = np.unique(ids_BT, return_inverse=True)
            rows = [self._theirs.tensor("model.embed_tokens.weight", (int(i), int(i) + 1)) for i in unique]
            x = torch.from_numpy(np.concatenate(rows)[places.reshape(ids_BT.shape)])
            yield Stage("embedding", x.numpy())
            positions = torch.arange(ids_BT.shape[1])[None]
            about: dict[str, Any] = dict(
                config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
            )
            masks = {"full_attention": code.create_causal_mask(**about),
                     "chunked_attention": code.create_chunked_causal_mask(**about)}  # fmt: skip
            turned = code.Llama4TextRotaryEmbedding(config=config)(x, positions)
            for number in range(config.num_hidden_layers):
                with torch.device("meta"):
                    layer = code.Llama4TextDecoderLayer(config, number)
                weights = {name: torch.from_numpy(w) for name, w in self._theirs.of_layer(number).items()}
                layer.load_state_dict(weights, strict=True, assign=True)
                seen: list[Any] = []
                if layer.is_moe_layer:
                    layer.feed_forward.router.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1]))
                x = layer.eval()(
                    x, attention_mask=masks[config.layer_types[number]], position_ids=positions, use_cache=False,
                    position_embeddings=turned,
                )  # fmt: skip
                yield Stage(f"layer {number}", x.numpy(), seen[0].numpy() if seen else None)
                del layer, weights
            norm = code.Llama4TextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            norm.weight.data = torch.from_numpy(self._theirs.tensor("model.norm.weight"))
            self._hidden = norm(x).numpy()
            yield Stage("final norm", self._hidden)

    def logits(self, first: int, last: int) -> np.ndarray:
        return self._hidden @ self._theirs.tensor("lm_head.weight", (first, last)).T


# --- the vision tower ----------------------------------------------------------------------------------------------

TILES = 3
"""Of random pixels, that are compared."""


def vision_error(folder: epath.PathLike, seed: int) -> float:
    """max |ours - theirs| / max |theirs| of what the text model gets of random tiles, against transformers, in fp32."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Llama4VisionConfig, Llama4VisionModel  # pyright: ignore[reportMissingImports]

    opened = open_folder(folder)
    cfg = opened.cfg
    assert cfg.vision is not None
    size = cfg.vision.image_size
    tiles = np.random.default_rng(seed).integers(0, 256, (TILES, size, size, 3), np.uint8)
    of_vision = [t.name for t in opened.table if t.paths[0][0] == "vision"]
    tensors = {name: opened.stored[name].whole().astype(np.float32) for name in of_vision}
    settings = hf_vision.config_to_hf(cfg.vision)
    make: Any = Llama4VisionConfig
    model: Any = Llama4VisionModel(make(**settings, attn_implementation="eager")).eval()
    named = {name.removeprefix(hf_vision.PREFIX): torch.from_numpy(x) for name, x in tensors.items()}
    projector = named.pop("multi_modal_projector.linear_1.weight")
    model.load_state_dict(named, strict=True)
    with torch.no_grad():
        pixels = torch.from_numpy(tiles.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)
        theirs = (model(pixels).last_hidden_state @ projector.T).numpy()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Vision(cfg, nnx.Rngs(0))))
    ours = {path: np.zeros(p.get_value().shape, np.float32) for path, p in nnx.to_flat_state(state)}
    for t in opened.table:
        if t.name in tensors:
            for path, x in zip(t.paths, t.from_hf(tensors[t.name]), strict=True):
                ours[path[1:]][t.index] = x
    weights = nnx.from_flat_state([(path, p.replace(jnp.asarray(ours[path]))) for path, p in nnx.to_flat_state(state)])
    with jax.default_matmul_precision("highest"):
        run: Any = jax.jit(lambda weights, tiles: nnx.merge(graphdef, weights)(tiles, Execution()))
        seen = np.asarray(run(weights, tiles))
    return float(np.max(np.abs(seen - theirs)) / np.max(np.abs(theirs)))
