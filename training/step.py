"""One training step for any number of learners."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from training.config import Learner, RunConfig
from training.mesh import BATCH_SPEC
from training.objectives import Sums, next_token
from training.optimizer import learning_rate, make_optimizer
from training.state import LearnerState, TrainState, abstract_state, execution, graphdef

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def make_train_step(cfg: RunConfig, mesh: Mesh, domains: int) -> StepFn:
    """The jitted step: (state, batch) -> (state, metrics by learner). The state is donated."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        learners, metrics = {}, {}
        for name, learner in cfg.learners.items():
            grads, sums = gradient(learner, mesh, domains, cfg.train.microbatches)(state.learners[name].params, batch)
            learners[name], norm = update(learner, cfg.train.steps, state.learners[name], grads)
            rate = learning_rate(learner.optimizer, cfg.train.steps)(state.step)
            metrics[name] = {"sums": sums, "grad_norm": norm, "learning_rate": rate}
        return TrainState(state.step + 1, learners), metrics

    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))


def update(learner: Learner, steps: int, state: LearnerState, grads: nnx.State) -> tuple[LearnerState, jax.Array]:
    """One optimizer step; also the gradient's global norm before clipping."""
    updates, opt_state = make_optimizer(learner.optimizer, steps).update(grads, state.optimizer, state.params)
    return LearnerState(optax.apply_updates(state.params, updates), opt_state), optax.tree.norm(grads)  # pyright: ignore


def gradient(learner: Learner, mesh: Mesh, domains: int, microbatches: int) -> Callable[..., tuple[nnx.State, Sums]]:
    """(params, batch) -> (mean gradient over the batch's valid tokens, sums), inside one `shard_map`.

    Each device walks its rows in `microbatches` parts, sums the gradients of the loss shares (`axes.py`) and the
    valid tokens, and divides once.
    """
    model, run = graphdef(learner), execution(learner)

    def share(params: nnx.State, batch: Batch) -> tuple[jax.Array, Sums]:
        out = nnx.merge(model, params)(batch.tokens, batch.positions, batch.segment_ids, run)
        return next_token(out, batch, learner, domains)

    def local(params: nnx.State, batch: Batch) -> tuple[nnx.State, Sums]:
        def part(params: nnx.State, batch: Batch) -> tuple[nnx.State, Sums]:
            (_, sums), grads = jax.value_and_grad(share, has_aux=True)(params, batch)
            return grads, sums

        grads, sums = accumulate(partial(part, params), batch, microbatches)
        return jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), run.sum_shares(grads)), sums

    def apply(params: nnx.State, batch: Batch) -> tuple[nnx.State, Sums]:
        specs = run.specs(params)
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, BATCH_SPEC), out_specs=(specs, P()), check_vma=False
        )  # fmt: skip
        return mapped(params, batch)

    return apply


def accumulate(part: Callable[[Batch], Any], batch: Batch, microbatches: int) -> Any:
    """Sum of `part` over the device's rows, cut into `microbatches`."""
    if microbatches == 1:
        return part(batch)
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, part(one)), None), zeros, parts)[0]
