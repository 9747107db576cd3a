"""A learner on held-out documents, per domain: forward only, over a fixed list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from training.config import Learner, RunConfig
from training.goodput import spent
from training.mesh import BATCH_SPEC
from training.metrics import measured, prefix
from training.objectives import Sums, objective
from training.state import TrainState, execution, graphdef, run_model
from training.step import summed_in_parts

EvalFn = Callable[[nnx.State, Batch], Sums]


def make_eval_step(learner: Learner, mesh: Mesh, domains: int) -> EvalFn:
    """The jitted (params, batch) -> what the objective sums, of labels alone.

    The same model and the same fused loss as in training, inside one `shard_map`, in the learner's microbatches.
    """
    model, run = graphdef(learner), execution(learner, mesh)

    def local(params: nnx.State, batch: Batch) -> Sums:
        def part(batch: Batch) -> tuple[Sums, None]:
            out = run_model(model, params, batch, run)
            return objective(out, batch, learner, domains, measure=True)[1], None

        return summed_in_parts(part, (batch,), learner.microbatches)[0]

    def eval_step(params: nnx.State, batch: Batch) -> Sums:
        specs = (run.specs(params), BATCH_SPEC)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(params, batch)

    return jax.jit(eval_step)


@spent("evaluate")
def evaluate(
    step: EvalFn, params: nnx.State, batches: Iterable[Batch], mesh: Mesh, domains: Sequence[str]
) -> dict[str, float]:
    """{"ce", "ce/DOMAIN", ...}: `metrics.measured` over all batches, each of them whole on every process."""
    sums = [jax.device_get(step(params, put_global(batch, mesh))) for batch in batches]
    return measured(jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), axis=0), *sums), domains)


def put_global(batch: Batch, mesh: Mesh) -> Any:
    """A batch that every process holds whole, onto the mesh: each device takes its part."""
    place = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), batch)


class BrokenOff(Exception):
    """An evaluation that was told to end before its last batch."""


class HeldOut:
    """Evaluates every learner of a run on held-out batches, a frozen one once: {"eval/ce", "eval/ce/DOMAIN" ...}."""

    def __init__(self, cfg: RunConfig, mesh: Mesh, domains: tuple[str, ...], batches: Sequence[Batch]):
        self.cfg, self.mesh, self.domains, self.batches = cfg, mesh, domains, batches
        self.steps = {n: make_eval_step(x, mesh, len(domains)) for n, x in cfg.learners.items()}
        self.frozen: dict[str, dict[str, float]] = {}

    def __call__(self, state: TrainState, go_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
        """`go_on` is asked before each batch; `BrokenOff` where it says no."""

        def batches() -> Iterator[Batch]:
            for batch in self.batches:
                if not go_on():
                    raise BrokenOff
                yield batch

        out = {}
        for name, step in self.steps.items():
            params = state.learners[name].params
            values = self.frozen.get(name) or evaluate(step, params, batches(), self.mesh, self.domains)
            if self.cfg.learners[name].optimizer is None:
                self.frozen[name] = values
            out |= {f"{prefix(name, self.cfg)}eval/{key}": value for key, value in values.items()}
        return out
