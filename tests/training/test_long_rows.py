"""At 262,144 tokens, whole chunks on each shard: what a step of Scout sends over the context axis, from its jaxpr."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from data.batch import DTYPES, Batch
from llama4_jax.axes import CONTEXT
from llama4_jax.config import scout
from training.config import Learner, MeshConfig, RunConfig, TrainConfig
from training.mesh import make_mesh
from training.state import abstract_state
from training.step import gradient

SHARDS, SEQ = 8, 262_144
CFG = scout()
SENDING = ("all_gather", "reduce_scatter", "psum", "ppermute", "all_to_all")


def sent(remat: str) -> list[tuple[str, str, int, int]]:
    """(primitive, scope, bytes of the operands, how often) of what names the context axis."""
    cfg = RunConfig("long", {"scout": Learner(CFG, remat=remat)}, mesh=MeshConfig(context=SHARDS),
                    train=TrainConfig(batch=1, seq_len=SEQ))  # fmt: skip
    mesh = make_mesh(cfg.mesh, jax.devices()[:SHARDS])
    params = abstract_state(cfg, mesh).learners["scout"].params
    batch = Batch(**{name: jax.ShapeDtypeStruct((1, SEQ), dtype) for name, dtype in DTYPES.items()})
    one = jax.ShapeDtypeStruct((), np.float32)
    jaxpr = jax.make_jaxpr(gradient(cfg.learners["scout"], mesh, 1))(params, batch, (one, one)).jaxpr
    return list(walk(jaxpr, "", 1))


def walk(jaxpr, scope: str, trips: int):
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        names = eqn.params.get("axis_name", eqn.params.get("axes", ()))
        if CONTEXT in (names if isinstance(names, tuple) else (names,)) and name.removesuffix("_invariant") in SENDING:
            yield name, here, sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars), trips
        inside = trips * eqn.params["length"] if name == "scan" else trips
        for inner in jaxprs_in_params(eqn.params):
            yield from walk(inner, here, inside)


@pytest.mark.parametrize("remat", ["block", "nested", "attention"])
def test_only_global_layers_exchange_activations(remat):
    found = sent(remat)
    assert not [x for x in found if "attention_local" in x[1]]
    within = [x for x in found if "layer" in x[1] and "fetch" not in x[1]]
    assert within and all("attention_global" in scope for _, scope, _, _ in within), within

    # In a loop over both kinds of layers the global branch stands once and is taken in one of four rounds.
    layers = 4 if remat == "nested" else 1
    kv_shard = 2 * (SEQ // SHARDS) * CFG.num_kv_heads * CFG.head_dim  # bytes of K, or of V, in bfloat16
    gathers = [(size, trips) for name, _, size, trips in within if name.startswith("all_gather") and size == kv_shard]
    passes = 3 if remat == "nested" else 2  # forward, and each time that keys and values are computed again
    total = sum(size * trips / layers for size, trips in gathers)
    assert total == 2 * kv_shard * CFG.num_layers / 4 * passes
    assert total <= 0.28 * 2 * kv_shard * CFG.num_layers * passes  # what gathering on every layer would send
