"""What a training step holds on a device, estimated without compiling: `llama4 plan --fast`.

State and batch are exact: shapes and shardings say them. The rest is counted by shape, for the learner that needs
most (they train one after the other), and each count is multiplied by a factor that says how often the compiler holds
such a thing at the peak. With R the tokens of a microbatch on a device, c the bytes of the compute dtype and t the
tensor axis, in the house's letters (`llama4_jax/axes.py`):

    gradients   fp32, as the weights are stored; twice with microbatches (the sum, and the new ones)
    saved       c R D for each thing kept to recompute from: a layer's input (`layer`, `attention`, which also keeps
                c R N H / t + 4 R N / t of attention's), a period's (`block`), both (`nested`); all of a layer (`none`)
    weights     c for each weight of a layer as fetched (of a period under `block`), and its gradient in c and fp32
    activations what a layer's backward pass holds (of a period's layers under `block`):
                c R / t (3 N H + 4 K H + 3 F) + 8 c R D of attention and the shared expert or the dense part, and
                c A R u (3 F / t + 4 D) of the routed ones, u the room of the dispatch over what is needed
    tables      embedding and head as fetched, V D (c + 4) each, V split over `tensor` and `expert`, and a chunk's
                logits, 4 bytes each

The factors were fitted to what compilers report; `docs/plans/accuracy.md` has the errors, on programs that were used
for the fit and on others (`python -m tools.plan_accuracy`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama4_jax.axes import EXPERT, TENSOR, TOKEN_AXES, Execution
from llama4_jax.config import ModelConfig
from llama4_jax.kernels.vocab_loss.api import CHUNK
from training.ahead import abstract_batch
from training.config import Learner, RunConfig
from training.state import abstract_state, execution

PARTS = ("gradients", "saved", "weights", "activations", "tables")
FACTORS = {
    "gpu": dict(gradients=1.28, saved=1.36, weights=0.25, activations=0.97, tables=0.49),
    "tpu": dict(gradients=1.49, saved=0.99, weights=0.37, activations=0.47, tables=0.46),
}
"""By `tools/plan_accuracy.py`."""


class Memory(NamedTuple):
    """Bytes of one device."""

    state: dict[str, dict[str, int]]  # by learner: weights, and the optimizer's and what weighs targets; exact
    batch: int  # exact
    learner: str  # whose step needs most beside them
    parts: dict[str, float]  # of that step, factors in

    @property
    def arguments(self) -> int:
        return self.batch + sum(sum(parts.values()) for parts in self.state.values())

    @property
    def peak(self) -> float:
        return self.arguments + sum(self.parts.values())


def estimate(cfg: RunConfig, mesh: Mesh, state: Any = None) -> Memory:
    """The estimate for a run's step on a mesh of any devices, real or standing in for some; `state` if at hand."""
    state = abstract_state(cfg, mesh) if state is None else state
    kept = {
        name: dict(weights=stored(s.params), optimizer=stored((s.optimizer, s.weighting)))
        for name, s in state.learners.items()
    }
    factors = FACTORS["tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"]
    steps = {
        name: {part: factors[part] * n for part, n in parts(cfg, learner, mesh, kept[name]["weights"]).items()}
        for name, learner in cfg.learners.items()
    }
    learner = max(steps, key=lambda name: sum(steps[name].values()))
    batch = stored(abstract_batch(cfg, mesh))
    return Memory(kept, batch + stored(state.step), learner, steps[learner])


def stored(tree: object) -> int:
    """Bytes of a device's shards."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parts(cfg: RunConfig, learner: Learner, mesh: Mesh, weights: int) -> dict[str, float | int]:
    """Bytes beside the state in one learner's step, by part, before any factor."""
    model, run, size = learner.model, execution(learner, mesh), mesh.shape
    c, trains = jnp.dtype(run.compute_dtype).itemsize, learner.optimizer is not None
    ways = math.prod(size[name] for name in TOKEN_AXES)
    R = cfg.train.batch * cfg.train.seq_len / ways / learner.microbatches
    D, L, period = model.embed_dim, model.num_layers, len(model.pattern)
    kinds = [kind.moe for kind in model.pattern]
    activations = [layer_activations(model, run, moe, R, c, size[TENSOR]) for moe in kinds]
    weights_c = [c * layer_weights(model, run, moe, size) for moe in kinds]
    together = sum if run.remat == "block" else max
    inputs = dict(none=0, attention=L, layer=L, block=L // period, nested=L // period + period)[run.remat]
    saved = c * R * D * inputs
    if run.remat == "attention":
        saved += L * R * model.num_heads / size[TENSOR] * (c * model.head_dim + 4)
    if run.remat == "none":
        saved = L / period * sum(activations)
    V = model.vocab_size / size[TENSOR] / size[EXPERT]
    seen, kept = vision_activations(cfg, learner, run, dict(size), c)
    activations.append(seen)
    if not trains:
        rest = dict(weights=max(weights_c), activations=max(activations) / 2, tables=V * D * c)
        return dict(gradients=0, saved=kept, **rest)
    if together is sum:
        activations = [sum(activations[:-1]), seen]
    return dict(
        gradients=weights * (1 if learner.microbatches == 1 else 2),
        saved=(0 if run.offload else saved) + kept,
        weights=together(weights_c) * (2 + 4 / c),
        activations=max(activations),
        tables=2 * V * D * (c + 4) + 4 * CHUNK * V * size[EXPERT],
    )


def vision_weights(model: ModelConfig, tensor: int) -> tuple[float, float]:
    """Weights of a device, gathered, without the small ones: of the tower, and of the adapter and the projector."""
    v = model.vision
    if v is None:
        return 0.0, 0.0
    D, A = v.embed_dim, v.adapter_dim
    tower = v.num_layers * (4 * D * D + 2 * D * v.mlp_dim) / tensor + 3 * v.patch_size**2 * D
    return tower, float(A * (v.shuffle**2 * D + A + model.embed_dim))


def vision_activations(
    cfg: RunConfig, learner: Learner, run: Execution, size: dict[str, int], c: int
) -> tuple[float, float]:
    """Bytes of images: (what a layer of the tower holds in its backward pass, what is kept meanwhile: each layer's
    input where the tower learns, and the tokens of the row's tiles, with their gradient)."""
    v = learner.model.vision
    if v is None or not cfg.images:
        return 0.0, 0.0
    ways = math.prod(size[name] for name in TOKEN_AXES)
    tiles = cfg.train.batch * cfg.train.tiles / ways / learner.microbatches
    learns = learner.optimizer is not None and learner.optimizer.vision == "all"
    P, D, t = v.grid**2 + 1, v.embed_dim, size[TENSOR]
    layer = c * tiles * P * (8 * D + (4 * D + 2 * v.mlp_dim) / t) + 3 * 4 * min(8, tiles) * v.num_heads / t * P * P
    tokens = 2 * c * tiles * size["context"] * v.tile_tokens * learner.model.embed_dim
    inputs = c * tiles * P * D * v.num_layers if learns else 0
    if learns and run.remat == "none":
        inputs = layer * v.num_layers
    return layer, inputs + tokens


def layer_weights(model: ModelConfig, run: Execution, moe: bool, size: dict[str, int]) -> float:
    """Weights of a layer that a device holds while it runs it."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    attention = D * H * (2 * N + 2 * K)
    if not moe:
        return (attention + 3 * D * model.dense_dim) / size[TENSOR]
    own = model.num_experts / (1 if run.dispatch == "fsdp" else size[EXPERT])
    return (attention + 3 * D * model.expert_dim * (1 + own)) / size[TENSOR] + D * model.num_experts


def layer_activations(model: ModelConfig, run: Execution, moe: bool, R: float, c: int, tensor: int) -> float:
    """Bytes of what a layer's backward pass needs of its forward pass, for R tokens."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    F = model.expert_dim if moe else model.dense_dim
    out = c * R / tensor * (3 * N * H + 4 * K * H + 3 * F) + 8 * c * R * D
    if moe:
        room = 1.0 if run.dispatch == "fsdp" else run.capacity
        out += c * model.experts_per_token * R * room * (3 * F / tensor + 4 * D)
    return out
