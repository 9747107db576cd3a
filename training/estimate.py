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

FLOPs are those of `training/flops.py` and what recomputation adds. Tests hold all of it against the count.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llama4_jax.axes import CONTEXT, EXPERT, FSDP, REPLICA, TENSOR, TOKEN_AXES
from training.config import Learner, RunConfig
from training.flops import ATTENTION, of_step, step_per_token
from training.memory import layer_weights, stored
from training.program import Collective, Flops, Program, sends
from training.state import abstract_state, execution

AGAIN = {"none": 0, "attention": 1, "layer": 1, "block": 1, "nested": 2}


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
        flops[name, part] = _flops(cfg.learners[name], mesh, part, per_token * tokens / mesh.size)
    hbm["collectives"] = sum(one.operand + one.wire for one in collectives)
    return Program(mesh.size, tokens, float(tokens * step_per_token(cfg)), flops, tuple(collectives), hbm)


def _flops(learner: Learner, mesh: Mesh, part: str, once: float) -> Flops:
    """Attention's backward pass has five products for four; under `attention` its scores are not computed again.

    What a layer ends with, the third product of a feed-forward part, is not needed again for its own gradients.
    """
    run = execution(learner, mesh)
    forward = once / 3 if learner.optimizer else once
    again = 0.0
    if learner.optimizer and part != "head":
        again = AGAIN[run.remat] * forward
        if again and part in ("dense", "experts", "shared_expert"):
            again -= forward / 3 / (len(learner.model.pattern) if run.remat == "block" else 1)
        if part in ATTENTION:
            again += forward / 2 - (forward if run.remat == "attention" else 0)
    room = run.capacity if part == "experts" and run.dispatch == "all_to_all" else 1.0
    return Flops(room * once, room * again)


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
        self.forwards = 1 + (AGAIN[self.run.remat] if self.trains else 0)
        self.passes = self.M * (self.forwards + self.trains)  # forward and backward ones
        # No layer computes its own end again (`_flops`), nor sends what that needs or gives.
        again = self.M if AGAIN[self.run.remat] and self.trains else 0
        self.twice = 2 * self.passes - again / (len(self.model.pattern) if self.run.remat == "block" else 1)

    def all(self) -> list[Collective]:
        found = [*self.fetches(), *self.experts(), *self.context(), *self.vocabulary()]
        rows = self.c * self.R * self.model.embed_dim
        found.append(self.one("all_reduce", (TENSOR,), self.twice * self.model.num_layers * rows))
        if self.trains:
            found.append(self.one("all_reduce", (REPLICA,), self.weights, self.run.reduce_dtype))
        return [one for one in found if one is not None]

    def one(self, kind: str, axes: tuple[str, ...], operand: float, dtype: str = "") -> Collective | None:
        axes = tuple(axis for axis in axes if self.size[axis] > 1)
        if not axes:
            return None
        ways = 1.0 if kind == "ppermute" else sends(kind, math.prod(self.size[axis] for axis in axes))
        dtype = dtype or self.run.compute_dtype
        return Collective(kind, axes, dtype, self.name, "", math.nan, operand, operand * ways)

    def fetches(self):
        model, size, run = self.model, self.size, self.run
        travel = run.dispatch != "fsdp"
        experts = model.num_moe_layers * 3 * model.embed_dim * model.expert_dim * model.num_experts / size[TENSOR]
        layers = model.num_blocks * sum(layer_weights(model, run, kind.moe, size) for kind in model.pattern)
        own = experts / (size[EXPERT] if travel else 1)
        tables = model.embed_dim * model.vocab_size / size[TENSOR] / size[EXPERT] * (2 if self.trains else 1)
        everywhere, without_expert = (FSDP, EXPERT, CONTEXT), (FSDP, CONTEXT)
        passes = self.M * self.forwards
        for weights, axes, times in (
            (layers - own, everywhere, passes),
            (own, without_expert if travel else everywhere, passes),
            (tables, without_expert, self.M),
        ):
            ways = math.prod(size[axis] for axis in axes)
            yield self.one("all_gather", axes, times * self.c * weights / ways)
            if self.trains:
                yield self.one("reduce_scatter", axes, self.M * self.d * weights, run.reduce_dtype)

    def experts(self):
        model, run = self.model, self.run
        if run.dispatch != "fsdp":
            room = run.capacity if run.dispatch == "all_to_all" else 1.0
            rows = self.c * model.experts_per_token * self.R * room * model.embed_dim
            times = 2 * self.passes  # there and back; but no layer needs its own end again (`_flops`)
            if AGAIN[run.remat] and self.trains:
                times -= self.M / (len(model.pattern) if run.remat == "block" else 1)
            yield self.one(run.dispatch, (EXPERT,), times * model.num_moe_layers * rows)

    def context(self):
        model, ways, t = self.model, self.size[CONTEXT], self.size[TENSOR]
        layers = model.num_blocks * sum(not kind.local for kind in model.pattern)
        queries, keys = (self.c * self.R * n * model.head_dim / t for n in (model.num_heads, model.num_kv_heads))
        if self.run.exchange == "heads":
            copies = max(1, ways // (model.num_kv_heads // t))
            yield self.one("all_to_all", (CONTEXT,), self.passes * layers * (2 * queries + 2 * copies * keys))
            return
        yield self.one("all_gather", (CONTEXT,), self.M * self.forwards * layers * 2 * keys)
        if self.trains:
            yield self.one("reduce_scatter", (CONTEXT,), self.M * layers * 2 * keys * ways)
        if self.run.exchange == "mirror":
            yield self.one("ppermute", (CONTEXT,), self.passes * layers * queries)

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
    passes = 1 + (AGAIN[run.remat] + 2 if learner.optimizer else 0)
    return passes * c * (tokens * rows + learner.microbatches * weights)
