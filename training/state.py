"""What a run carries from step to step: for each learner its weights and its optimizer's state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from llama4_jax.axes import RULES, Execution
from llama4_jax.config import ModelConfig
from llama4_jax.kernels.attention.mosaic_gpu import MAX_HEAD_DIM
from llama4_jax.quant import check_device
from llama4_jax.text import Output, Transformer, abstract
from training import weighting
from training.config import Learner, OptimizerConfig, RunConfig
from training.mesh import deals_heads, shardings
from training.optimizer import make_optimizer


class LearnerState(NamedTuple):
    """Trees of `nnx.Param`, which carry their logical axes with them: so do Adam's moments."""

    params: nnx.State  # fp32
    optimizer: Any  # None for a frozen teacher
    weighting: Any = None  # `Weighting`, running means behind the weights of its targets; None for a frozen teacher


class TrainState(NamedTuple):
    step: Any  # int32 [], optimizer steps done
    learners: dict[str, LearnerState]


class Backends(NamedTuple):
    """What `auto` stands for."""

    attention: str
    exchange: Any
    grouped_matmul: str


BACKENDS = {
    "cpu": Backends("blockwise", "mirror", "blocks"),
    "tpu": Backends("splash", "mirror", "megablox"),
    "gpu": Backends("mosaic_gpu", "heads", "triton"),
}


def execution(learner: Learner, mesh: Mesh) -> Execution:
    """How the learner runs on the mesh's devices; ValueError, in a line, for what they or its backends cannot do."""
    check_device(learner.quant, mesh.devices.flat[0])
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform == "cuda" else platform
    best = BACKENDS[platform]
    if platform == "gpu" and not suits_mosaic(learner):
        best = best._replace(attention="blockwise")
    chosen = {
        name: one if getattr(learner, name) == "auto" else getattr(learner, name)
        for name, one in best._asdict().items()
    }
    if learner.exchange == "auto" and not deals_heads(learner.model, mesh):
        chosen["exchange"] = "mirror"
    return Execution(
        learner.compute_dtype, learner.reduce_dtype, learner.remat, learner.offload, **chosen,
        dispatch=learner.dispatch, capacity=learner.capacity, quant=learner.quant, platform=platform,
        rules=storage_rules(learner.model, mesh.shape),
    )  # fmt: skip


def suits_mosaic(learner: Learner) -> bool:
    """Whether the GPU's best attention kernel takes such numbers and heads."""
    return learner.compute_dtype == "bfloat16" and learner.model.head_dim <= MAX_HEAD_DIM


def storage_rules(model: ModelConfig, sizes: Mapping[str, int]) -> Mapping[str, tuple[str, ...]]:
    """Where logical axes are stored on a mesh of these sizes: the tower's width is no power of two (1408 = 2^7 x 11),
    so of the axes that weights are split over those take part that divide it, as many devices as they can be."""
    if model.vision is None:
        return RULES
    width, axes = model.vision.embed_dim, RULES["tower"]
    fitting = [some for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)
               if width % math.prod(sizes[name] for name in some) == 0]  # fmt: skip
    return {**RULES, "tower": max(fitting, key=lambda some: math.prod(sizes[name] for name in some))}


def run_model(model: nnx.GraphDef, params: nnx.State, batch: Batch, run: Execution) -> Output:
    """The model on the rows of a batch, with their images where it has any."""
    return nnx.merge(model, params)(
        batch.tokens, batch.positions, batch.segment_ids, run, batch.tiles, batch.slots
    )  # fmt: skip


def graphdef(learner: Learner) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.split(abstract(learner.model))[0]


def init_state(cfg: RunConfig) -> TrainState:
    """Fresh weights and optimizer states; a learner's weights depend on the seed and its own name alone, of which only
    what stands before the first `-` counts: scout-a and scout-b begin alike, to be compared."""

    def init(name: str, learner: Learner) -> LearnerState:
        key = jax.random.fold_in(jax.random.key(cfg.train.seed), _stable_hash(name.partition("-")[0]))
        params = nnx.split(Transformer(learner.model, nnx.Rngs(params=key)))[1]
        optimizer = learner.optimizer and make_optimizer(learner.optimizer, cfg.train.steps).init(params)
        return LearnerState(params, optimizer, learner.optimizer and weighting.init())

    return TrainState(jnp.int32(0), {name: init(name, learner) for name, learner in cfg.learners.items()})


def state_specs(cfg: RunConfig, mesh: Mesh, state: TrainState) -> TrainState:
    """PartitionSpecs of a state, abstract or not."""
    learners = {name: execution(cfg.learners[name], mesh).specs(s) for name, s in state.learners.items()}
    return TrainState(P(), learners)


@cache
def _abstract(model: ModelConfig, optimizer: OptimizerConfig | None, steps: int) -> LearnerState:
    """Shapes and dtypes; tracing the initialisers of a large model takes most of a second."""
    params = _abstract_params(model)
    state = optimizer and jax.eval_shape(make_optimizer(optimizer, steps).init, params)
    return LearnerState(params, state, optimizer and jax.eval_shape(weighting.init))


@cache
def _abstract_params(model: ModelConfig) -> nnx.State:
    return nnx.split(abstract(model))[1]


def abstract_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    learners = {n: _abstract(x.model, x.optimizer, cfg.train.steps) for n, x in cfg.learners.items()}
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), learners)
    placed = shardings(mesh, state_specs(cfg, mesh, state))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def create_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """`init_state`, made where it will lie: the same values on every mesh."""
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    make: Callable[[], TrainState] = jax.jit(partial(init_state, cfg), out_shardings=placed)
    return make()


def _stable_hash(name: str) -> int:
    return sum(byte * 31**i for i, byte in enumerate(name.encode())) % 2**31
