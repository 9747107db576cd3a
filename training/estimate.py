"""What a step does, by formula: the planner's first look, in milliseconds. `training/program.py` counts it instead.

Everything is of one device and one step, for each learner. A forward pass of its layers runs 1 + a times, where a
layer is computed again a times: 0 (`none`), 1 (`attention`, `layer`, `block`), 2 (`nested`); with M microbatches of R
tokens each. In the house's letters, c and d bytes of the compute and the reduction dtype, t the tensor axis:

    all_gather      M (1 + a) times a layer's weights in c (M times the tables), over the axes they are stored over
    reduce_scatter  M times their gradients in d, over the same
    all_to_all      c A R u D of routed tokens, there and back, in each pass of a MoE layer and the backward one
                    (u: the room of the dispatch over what is needed)
    over context    in global layers keys and values gathered, and their gradients reduced back, with half of the
                    queries and outputs exchanged (`mirror`); or all heads exchanged (`heads`)
    over tensor     two sums of c R D a layer and pass
    over expert     hidden states to the vocabulary's columns and gradients back, looked-up rows the other way
    over replica    gradients, once

(`again` has a by layer.) FLOPs are those of `training/flops.py` and what recomputation adds. Tests hold all of it
against the count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from llama4_jax.axes import CONTEXT, EXPERT, FSDP, REPLICA, TENSOR, TOKEN_AXES
from llama4_jax.config import LayerKind, ModelConfig
from llama4_jax.text import neighbours
from training.config import Learner, RunConfig
from training.flops import ATTENTION, of_step, step_per_token, vision
from training.hlo import sends
from training.memory import layer_weights, stored, vision_weights
from training.program import Collective, Flops, Program
from training.state import abstract_state, execution


class Again(NamedTuple):
    """How often a layer is computed again, and of these times how often without its end: the feed-forward part's third
    product, and what goes back from there, which no layer's own gradients need."""

    times: int
    endless: int


def again(model: ModelConfig, remat: str) -> list[Again]:
    """Of each layer of a period."""
    period = len(model.pattern)
    if remat in ("attention", "layer"):
        return [Again(1, 1)] * period
    if remat == "block":
        return [Again(1, 0)] * (period - 1) + [Again(1, 1)]
    if remat == "nested":  # a period's last layer is not run to find the others' inputs, unless in a loop with them
        first, last = neighbours(model.pattern, remat)[-1]
        return [Again(2, 1)] * (period - 1) + [Again(1 + (first != last), 1)]
    return [Again(0, 0)] * period


def estimate_program(cfg: RunConfig, mesh: Mesh, state: Any = None) -> Program:
    """The estimate of `count(cfg, mesh)`."""
    state = abstract_state(cfg, mesh) if state is None else state
    tokens = cfg.train.batch * cfg.train.seq_len
    flops: dict[tuple[str, str], Flops] = {}
    collectives: list[Collective] = []
    hbm = dict(matmuls=0.0, collectives=0.0, state=0.0)
    for name, learner in cfg.learners.items():
        weights = stored(state.learners[name].params)
        collectives += _Traffic(cfg, name, learner, mesh, weights).all()
        hbm["matmuls"] += _matmul_bytes(cfg, learner, mesh)
        if learner.optimizer:
            hbm["state"] += 2 * stored(state.learners[name]) + 2 * weights
    for (name, part), per_token in of_step(cfg).items():
        if part == "vision":
            flops[name, part] = _vision_flops(cfg.learners[name], mesh, per_token * tokens / mesh.size)
            continue
        flops[name, part] = _flops(cfg.learners[name], mesh, part, per_token * tokens / mesh.size)
    hbm["collectives"] = sum(one.operand + one.wire for one in collectives)
    return Program(mesh.size, tokens, float(tokens * step_per_token(cfg)), flops, tuple(collectives), hbm)


def _flops(learner: Learner, mesh: Mesh, part: str, once: float) -> Flops:
    """Attention's backward pass has five products for four; under `attention` its scores are not computed again."""
    run, model = execution(learner, mesh), learner.model
    has = dict(attention_local="local", attention_global="global", dense="dense", router="moe", experts="moe",
               shared_expert="moe").get(part)  # fmt: skip
    of_part = [a for a, kind in zip(again(model, run.remat), model.pattern, strict=True)
               if has in (None, "local" if kind.local else "global", "moe" if kind.moe else "dense")]  # fmt: skip
    more = 0.0
    if learner.optimizer and of_part and part != "head":
        times, endless = (sum(column) / len(of_part) for column in zip(*of_part, strict=True))
        more = times - (endless / 3 if part in ("dense", "experts", "shared_expert") else 0)
        if part in ATTENTION:
            more += 1 / 2 - (run.remat == "attention")
    scale = run.capacity if part == "experts" and run.dispatch == "all_to_all" else 1.0
    scale *= mesh.shape[TENSOR] if part == "router" else 1  # each device of the axis computes it
    return Flops(scale * once, scale * more * once / (3 if learner.optimizer else 1))


def _vision_flops(learner: Learner, mesh: Mesh, once: float) -> Flops:
    """The tower's layers are computed again where they learn, and their scores once more by themselves; what is outside
    the heads and the hidden layer each device of the tensor axis computes."""
    v, model, learns = learner.model.vision, learner.model, learner.optimizer.vision if learner.optimizer else "none"
    assert v is not None
    P, D = v.grid**2 + 1, v.embed_dim
    layers, scores = v.num_layers * P * (8 * D * D + 4 * P * D + 4 * D * v.mlp_dim), v.num_layers * 4 * P * P * D
    whole = vision(model, learns)
    inside = layers * (3 if learns == "all" else 1)
    outside = (whole - inside) * mesh.shape[TENSOR]
    end = v.num_layers * 2 * P * D * v.mlp_dim  # the last product of a layer, which no gradient needs
    remat = execution(learner, mesh).remat != "none"
    more = (scores / 2 + remat * (layers - end) if learns == "all" else 0) / whole * once
    return Flops(once * (inside + outside) / whole, more)


class _Traffic:
    """The collectives of one learner's step."""

    def __init__(self, cfg: RunConfig, name: str, learner: Learner, mesh: Mesh, weights: int):
        self.name, self.learner, self.model, self.size = name, learner, learner.model, dict(mesh.shape)
        self.run, self.weights, self.trains = execution(learner, mesh), weights, learner.optimizer is not None
        ways = math.prod(self.size[axis] for axis in TOKEN_AXES)
        self.M = learner.microbatches
        self.R = cfg.train.batch * cfg.train.seq_len / ways / self.M
        self.c = jnp.dtype(self.run.compute_dtype).itemsize
        self.d = jnp.dtype(self.run.reduce_dtype).itemsize
        some = again(self.model, self.run.remat) if self.trains else [Again(0, 0)] * len(self.model.pattern)
        self.layers = list(zip(self.model.pattern, some, strict=True))
        self.tiles = cfg.train.batch * cfg.train.tiles / ways if cfg.images else 0.0  # of a device

    def times(self, of: Callable[[LayerKind, Again], float]) -> float:
        """Summed over the layers, and microbatches."""
        return float(self.M * self.model.num_blocks * sum(of(kind, again) for kind, again in self.layers))

    def all(self) -> list[Collective]:
        found = [*self.fetches(), *self.experts(), *self.context(), *self.vocabulary(), *self.vision()]
        rows = self.c * self.R * self.model.embed_dim
        sums = self.times(lambda _, again: 2 * (1 + again.times + self.trains) - again.endless)
        sums += self.M * (1 + self.trains)  # of looked-up rows, and of the gradients of hidden states
        found.append(self.one("all_reduce", (TENSOR,), sums * rows))
        if self.trains:
            found.append(self.one("all_reduce", (REPLICA,), self.weights * self.d / 4, self.run.reduce_dtype))
        return [one for one in found if one is not None]

    def one(self, kind: str, axes: tuple[str, ...], operand: float | int, dtype: str = "") -> Collective | None:
        axes = tuple(axis for axis in axes if self.size[axis] > 1)
        if not axes:
            return None
        ways = 1.0 if kind == "ppermute" else sends(kind, math.prod(self.size[axis] for axis in axes))
        dtype = dtype or self.run.compute_dtype
        return Collective(kind, axes, dtype, self.name, "", math.nan, operand, operand * ways)

    def fetches(self):
        model, size, run = self.model, self.size, self.run
        travel = run.dispatch != "fsdp"
        own = 3 * model.embed_dim * model.expert_dim * model.num_experts / size[TENSOR]
        own /= size[EXPERT] if travel else 1

        def experts(kind: LayerKind) -> float:
            return own if kind.moe else 0.0

        def others(kind: LayerKind) -> float:
            return layer_weights(model, run, kind.moe, size) - experts(kind)

        def table(kind: LayerKind) -> float:  # spread over the layers, to be added up with them
            tables = model.embed_dim * model.vocab_size / size[TENSOR] / size[EXPERT]
            return tables * (2 if self.trains else 1) / model.num_layers

        everywhere, without_expert = (FSDP, EXPERT, CONTEXT), (FSDP, CONTEXT)
        for weights, axes, anew in (
            (others, everywhere, True),
            (experts, without_expert if travel else everywhere, True),
            (table, without_expert, False),
        ):
            ways = math.prod(size[axis] for axis in axes)
            fetched = self.times(lambda kind, again, w=weights, a=anew: w(kind) * (1 + a * again.times))
            yield self.one("all_gather", axes, self.c * fetched / ways)
            if self.trains:
                reduced = self.times(lambda kind, _, w=weights: w(kind))
                yield self.one("reduce_scatter", axes, self.d * reduced, run.reduce_dtype)

    def experts(self):
        model, run = self.model, self.run
        if run.dispatch != "fsdp":
            room = run.capacity if run.dispatch == "all_to_all" else 1.0
            rows = self.c * model.experts_per_token * self.R * room * model.embed_dim
            exchanges = self.times(lambda kind, again: kind.moe * (2 * (1 + again.times + self.trains) - again.endless))
            yield self.one(run.dispatch, (EXPERT,), exchanges * rows)  # there and back

    def context(self):
        model, ways, t = self.model, self.size[CONTEXT], self.size[TENSOR]
        queries, keys = (self.c * self.R * n * model.head_dim / t for n in (model.num_heads, model.num_kv_heads))
        forwards = self.times(lambda kind, again: (not kind.local) * (1 + again.times))
        backwards = self.times(lambda kind, _: (not kind.local) * self.trains)
        if self.run.exchange == "heads":
            copies = max(1, ways // (model.num_kv_heads // t))
            yield self.one("all_to_all", (CONTEXT,), (forwards + backwards) * (2 * queries + 2 * copies * keys))
            return
        yield self.one("all_gather", (CONTEXT,), forwards * 2 * keys)
        yield self.one("reduce_scatter", (CONTEXT,), backwards * 2 * keys * ways)
        if self.run.exchange == "mirror":
            yield self.one("ppermute", (CONTEXT,), (forwards + backwards) * queries)

    def vision(self):
        """The tower's weights gathered, twice where it learns, and their gradients; its tokens to the row's devices."""
        v = self.model.vision
        if v is None or not self.tiles:
            return
        learns = self.learner.optimizer is not None and self.learner.optimizer.vision == "all"
        every, again = (FSDP, EXPERT, CONTEXT), 1 + (learns and self.run.remat != "none")
        tower, rest = vision_weights(self.model, self.size[TENSOR])
        stored_over = self.run.rules["tower"]
        for weights, axes, times in ((tower, stored_over, again), (rest, every, 1)):
            ways = math.prod(self.size[axis] for axis in axes)
            yield self.one("all_gather", axes, self.c * self.M * times * weights / ways)
            if learns:
                yield self.one("reduce_scatter", axes, self.d * self.M * weights, self.run.reduce_dtype)
        if learns and (left := tuple(axis for axis in every if axis not in stored_over)):
            ways = math.prod(self.size[axis] for axis in stored_over)
            yield self.one("all_reduce", left, self.d * tower / ways, self.run.reduce_dtype)
        tokens = self.c * self.tiles * v.tile_tokens * self.model.embed_dim
        yield self.one("all_gather", (CONTEXT,), tokens)
        if self.learner.optimizer is not None and self.learner.optimizer.vision != "none":
            yield self.one("reduce_scatter", (CONTEXT,), tokens * self.size[CONTEXT])
        rows = self.c * self.tiles * (v.grid**2 + 1) * v.embed_dim * v.num_layers
        yield self.one("all_reduce", (TENSOR,), 2 * (again + learns) * rows)

    def vocabulary(self):
        rows = self.M * self.c * self.R * self.model.embed_dim
        ways = self.size[EXPERT]
        yield self.one("all_gather", (EXPERT,), rows * 2 if self.trains else 0)  # hidden states; gradients of rows
        yield self.one("reduce_scatter", (EXPERT,), ways * rows * (2 if self.trains else 1))  # and the other way


def _matmul_bytes(cfg: RunConfig, learner: Learner, mesh: Mesh) -> float:
    """Operands and results of the matrix products, attention's without scores: weights and rows, in each pass."""
    model, run, size = learner.model, execution(learner, mesh), mesh.shape
    c = jnp.dtype(run.compute_dtype).itemsize
    tokens = cfg.train.batch * cfg.train.seq_len / math.prod(size[axis] for axis in TOKEN_AXES)
    D, N, K, H, t = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, size[TENSOR]
    room = run.capacity if run.dispatch == "all_to_all" else 1.0
    rows = 0.0
    for kind in model.pattern:
        F, times = (model.expert_dim, 1 + model.experts_per_token * room) if kind.moe else (model.dense_dim, 1)
        rows += model.num_blocks * (2 * D + (4 * N + 6 * K) * H / t + times * (2 * D + 3 * F / t))
    weights = model.num_blocks * sum(layer_weights(model, run, kind.moe, dict(size)) for kind in model.pattern)
    times = sum(one.times for one in again(model, run.remat)) / len(model.pattern)
    passes = 1 + (times + 2 if learner.optimizer else 0)
    return passes * c * (tokens * rows + learner.microbatches * weights)
