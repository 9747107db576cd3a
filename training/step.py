"""One training step for any number of learners: pretraining, a frozen teacher, co-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from llama4_jax.axes import Execution
from llama4_jax.kernels.vocab_loss.comparison import Dense
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import weighting
from training.config import Learner, OptimizerConfig, RunConfig
from training.mesh import BATCH_SPEC
from training.objectives import Sums, objective
from training.optimizer import held, learning_rate, make_optimizer
from training.router_bias import follow_load
from training.state import LearnerState, TrainState, abstract_state, execution, graphdef, run_model
from training.weighting import Mix

StepFn = Callable[..., tuple[TrainState, dict[str, Any]]]


class Taught(NamedTuple):
    """What a learner hands to its students: its hidden states [B, T, U] and its unembedding, as stored."""

    hidden: Any
    unembedding: nnx.State


def make_train_step(cfg: RunConfig, mesh: Mesh, domains: int) -> StepFn:
    """The jitted step: (state, batch, targets) -> (state, metrics by learner). The state is donated.

    Learners are walked in their order, teachers first. One with an optimizer takes its gradient and is updated;
    what it teaches comes from that same forward pass, by weights of before the update. One without only runs forward.
    All its students share it. A learner whose loss or gradient is not finite stays as it was, optimizer and all, and
    `ok` among its metrics says so. `targets` holds those of teachers elsewhere, by `Distillation.teacher`, [B, T, ...].
    """
    teachers = {learner.distillation.teacher for learner in cfg.learners.values()}

    def train_step(
        state: TrainState, batch: Batch, targets: Mapping[str, SparseTargets] = {}
    ) -> tuple[TrainState, dict[str, Any]]:
        learners, metrics = {}, {}
        taught: dict[str, Any] = dict(targets)
        elsewhere = {t for t in teachers if t and t not in cfg.learners}
        if elsewhere != set(targets):
            raise ValueError(f"the step needs targets of {sorted(elsewhere)}, not of {sorted(targets)}")
        for name, learner in cfg.learners.items():
            before, steps = state.learners[name], cfg.train.steps
            with jax.named_scope(name):
                if learner.optimizer is None:
                    learners[name], hidden = before, forward(learner, mesh)(before.params, batch)
                else:
                    rate = learning_rate(learner.optimizer, steps)(state.step)
                    distillation = learner.distillation
                    teacher, peak = distillation.teacher, learner.optimizer.learning_rate
                    mix = weighting.weights(distillation, before.weighting, rate, peak, state.step, steps)
                    take = gradient(learner, mesh, domains, teacher=cfg.learners.get(teacher), teaches=name in teachers)
                    grads, sums, hidden = take(before.params, batch, mix if teacher else None, taught.get(teacher))
                    new, norm = update(learner.optimizer, steps, mesh, before, grads)
                    if teacher:
                        means = weighting.update(distillation, before.weighting, sums.by_domain, state.step, steps)
                        new = new._replace(weighting=means)
                    new = follow_load(learner, new, sums.load, state.step, steps)
                    ok = is_finite(norm, sums)
                    learners[name] = jax.tree.map(partial(jnp.where, ok), new, before)
                    metrics[name] = dict(sums=sums, grad_norm=norm, learning_rate=rate, step=state.step, ok=ok)
            # The barrier ends this learner before the next one starts: their residuals do not live side by side.
            batch, learners[name], hidden = jax.lax.optimization_barrier((batch, learners[name], hidden))
            if name in teachers:
                taught[name] = Taught(jax.lax.stop_gradient(hidden), before.params["unembedding"])
        return TrainState(state.step + 1, learners), metrics

    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))


def is_finite(norm: jax.Array, sums: Sums) -> jax.Array:
    """Whether a step's gradient and losses are numbers; the learner stays as it was where they are not."""
    losses = sum(sums.by_domain[name].sum() for name in ("ce", "weighted") if name in sums.by_domain)
    return jnp.isfinite(norm) & jnp.isfinite(losses + sums.balance + sums.z)


@jax.named_scope("update")
def update(
    cfg: OptimizerConfig, steps: int, mesh: Mesh, state: LearnerState, grads: nnx.State
) -> tuple[LearnerState, jax.Array]:
    """One optimizer step; also the gradient's global norm before clipping."""
    updates, opt_state = make_optimizer(cfg, steps, mesh).update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return state._replace(params=params, optimizer=opt_state), optax.tree.norm(grads)  # pyright: ignore


def forward(learner: Learner, mesh: Mesh) -> Callable[[nnx.State, Batch], jax.Array]:
    """(params, batch) -> hidden states [B, T, D] of a learner that is not trained."""
    model, run = graphdef(learner), execution(learner, mesh)

    def local(params: nnx.State, batch: Batch) -> jax.Array:
        def part(batch: Batch) -> jax.Array:
            return run_model(model, params, batch, run).hidden

        return in_parts(part, batch, learner.microbatches)

    def apply(params: nnx.State, batch: Batch) -> jax.Array:
        specs = (run.specs(params), BATCH_SPEC)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH_SPEC, check_vma=False)(params, batch)

    return apply


def gradient(
    learner: Learner, mesh: Mesh, domains: int, teacher: Learner | None = None, teaches: bool = False
) -> Callable[..., tuple[nnx.State, Sums, jax.Array | None]]:
    """(params, batch, mix, taught) -> (mean gradient over the batch's valid tokens, sums, hidden if it `teaches`).

    `taught`: what `teacher` hands on, or the targets of one elsewhere, or None. Inside one `shard_map`: each device
    walks its rows in microbatches, sums the gradients of the loss shares (`llama4_jax/axes.py`) and the valid tokens,
    and divides once.
    """
    model, run, teachers = graphdef(learner), execution(learner, mesh), execution(teacher or learner, mesh)

    def share(params: nnx.State, batch: Batch, mix: Mix | None, targets: Dense | SparseTargets | None):
        out = run_model(model, held(learner.optimizer, params), batch, run)
        loss, sums = objective(out, batch, learner, domains, mix, targets)
        return loss, (sums, out.hidden if teaches else None)

    def local(params: nnx.State, batch: Batch, mix: Mix | None, taught: Taught | SparseTargets | None):
        rows, kernel = taught, None
        if isinstance(taught, Taught):
            rows, kernel = taught.hidden, _fetch_unembedding(teachers, taught)

        def part(batch: Batch, rows: jax.Array | SparseTargets | None):
            targets = rows if kernel is None else Dense(rows, kernel)
            (_, (sums, hidden)), grads = jax.value_and_grad(share, has_aux=True)(params, batch, mix, targets)
            return (grads, sums), hidden

        (grads, sums), hidden = summed_in_parts(part, (batch, rows), learner.microbatches)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), run.sum_shares(grads))
        return grads, sums, hidden

    def apply(params: nnx.State, batch: Batch, mix: Mix | None = None, taught: Taught | SparseTargets | None = None):
        specs, source = run.specs(params), BATCH_SPEC
        if isinstance(taught, Taught):
            source = Taught(BATCH_SPEC, teachers.specs(taught.unembedding))
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, BATCH_SPEC, P(), source), out_specs=(specs, P(), BATCH_SPEC),
            check_vma=False,
        )  # fmt: skip
        return mapped(params, batch, mix, taught)

    return apply


def _fetch_unembedding(run: Execution, taught: Taught) -> jax.Array:
    return run.fetch(taught.unembedding)["kernel_DV"].get_value()


def _cut(tree: Any, parts: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def in_parts(part: Callable[[Batch], jax.Array], batch: Batch, parts: int) -> jax.Array:
    """`part` of the device's rows, run over `parts` of them one after the other."""
    if parts == 1:
        return part(batch)
    out = jax.lax.map(part, _cut(batch, parts))
    return out.reshape(-1, *out.shape[2:])


def summed_in_parts(part: Callable[..., tuple[Any, Any]], rows: tuple, parts: int) -> tuple[Any, Any]:
    """`part(*rows) -> (to sum, to concatenate)` over `parts` of the device's rows."""
    if parts == 1:
        return part(*rows)
    cut = _cut(rows, parts)
    shapes = jax.eval_shape(lambda cut: part(*jax.tree.map(lambda x: x[0], cut))[0], cut)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(total, one):
        summed, kept = part(*one)
        # Without the barrier XLA reduces the tables' gradients over devices only after the loop: for once less to send
        # it holds them whole, in fp32, throughout (and fails where they are reduced in bfloat16).
        summed = jax.lax.optimization_barrier(summed)
        return jax.tree.map(jnp.add, total, summed), kept

    total, kept = jax.lax.scan(body, zeros, cut)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
