"""At 262,144 tokens, whole chunks on each shard: what a step of Scout sends over the context axis, from its jaxpr."""

from __future__ import annotations

import pytest

from llama4_jax.axes import CONTEXT
from llama4_jax.config import scout
from training.chips import devices
from training.config import Learner, MeshConfig, RunConfig, TrainConfig
from training.mesh import make_mesh
from training.program import Collective, count

SHARDS, SEQ = 8, 262_144
CFG = scout()


def crossing(remat: str) -> list[Collective]:
    """What goes over the context axis in a step."""
    cfg = RunConfig("long", {"scout": Learner(CFG, remat=remat)}, mesh=MeshConfig(context=SHARDS),
                    train=TrainConfig(batch=1, seq_len=SEQ))  # fmt: skip
    mesh = make_mesh(cfg.mesh, devices("v5p:2x2x2"))
    return [one for one in count(cfg, mesh).collectives if CONTEXT in one.axes]


@pytest.mark.parametrize("remat", ["block", "nested", "attention"])
def test_only_global_layers_exchange_activations(remat):
    found = crossing(remat)
    # Weights, and at the step's end sums of statistics; of layers, those of global attention alone.
    within = [one for one in found if one.part not in ("fetch", "other")]
    assert {one.part for one in within} == {"attention_global"}
    kv_shard = 2 * (SEQ // SHARDS) * CFG.num_kv_heads * CFG.head_dim  # bytes of K, or of V, in bfloat16
    (gathers,) = (one for one in within if one.kind == "all_gather" and one.dtype == "bfloat16")
    passes = 3 if remat == "nested" else 2  # forward, and each time that keys and values are computed again
    assert gathers.operand == 2 * kv_shard * CFG.num_layers / 4 * passes
    assert gathers.operand <= 0.28 * 2 * kv_shard * CFG.num_layers * passes  # what all layers would send
    assert all(one.kind == "all_reduce" and one.operand < 1e5 for one in found if one.part == "other")
