"""Cross-entropy on held-out documents, per domain: forward only, over a fixed list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from training.config import Learner
from training.mesh import BATCH_SPEC
from training.metrics import domain_means
from training.objectives import objective
from training.state import execution, graphdef
from training.step import summed_in_parts

EvalFn = Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]


def make_eval_step(learner: Learner, mesh: Mesh, domains: int) -> EvalFn:
    """The jitted (params, batch) -> (CE summed by domain, valid tokens by domain), [domains] each, in nats.

    The same model and the same fused loss as in training, inside one `shard_map`, in the learner's microbatches.
    """
    model, run = graphdef(learner), execution(learner, mesh)
    labels_only = (jnp.float32(1), jnp.float32(0))

    def local(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def part(batch: Batch) -> tuple[tuple[jax.Array, jax.Array], None]:
            out = nnx.merge(model, params)(batch.tokens, batch.positions, batch.segment_ids, run)
            sums = objective(out, batch, learner, domains, labels_only)[1]
            return (sums.domain_ce, sums.domain_tokens), None

        return summed_in_parts(part, (batch,), learner.microbatches)[0]

    def eval_step(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        specs = (run.specs(params), BATCH_SPEC)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(params, batch)

    return jax.jit(eval_step)


def evaluate(
    step: EvalFn, params: nnx.State, batches: Iterable[Batch], mesh: Mesh, domains: Sequence[str]
) -> dict[str, float]:
    """{"ce", "ce/DOMAIN" ...}: nats per token over all batches, each of them whole on every process."""
    sums = [step(params, put_global(batch, mesh)) for batch in batches]
    ce, tokens = (np.sum([np.asarray(s[i], np.float64) for s in sums], axis=0) for i in (0, 1))
    return domain_means("ce", ce, tokens, domains)


def put_global(batch: Batch, mesh: Mesh) -> Any:
    """A batch that every process holds whole, onto the mesh: each device takes its part."""
    place = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), batch)
