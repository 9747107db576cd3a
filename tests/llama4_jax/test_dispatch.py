"""The dispatches: each gives what every expert on its own rows gives, on any expert axis, and says what it dropped."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama4_jax.axes import EXPERT, TOKEN_AXES, Execution, psum
from llama4_jax.config import tiny_scout
from llama4_jax.dispatch import DISPATCHES
from llama4_jax.moe import MoE
from training.config import MeshConfig
from training.mesh import make_mesh

B, T, E = 8, 24, 8
CFG = replace(tiny_scout(), embed_dim=32, expert_dim=48, num_experts=E)
ROOMY = 8.0  # capacity at which nothing can be dropped


def layer(cfg=CFG) -> tuple[nnx.GraphDef, nnx.State]:
    moe = MoE(cfg, nnx.Rngs(1))
    moe.router_DE.set_value(moe.router_DE.get_value() * 20)
    return nnx.split(moe)


def inputs() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    valid_BT = np.ones((B, T), np.float32)
    valid_BT[3, 10:] = valid_BT[6, :] = 0
    return jnp.asarray(rng.normal(size=(B, T, 32)), jnp.float32), jnp.asarray(valid_BT)


def run(execution: Execution, devices: int, cfg=CFG):
    """(y, dropped, gradients of weights and of x) of sum(sin(y) valid) over an expert axis of `devices`."""
    graphdef, state = layer(cfg)
    x_BTD, valid_BT = inputs()

    def local(state, x_BTD, valid_BT):
        def share(state, x_BTD):
            moe = nnx.merge(graphdef, execution.fetch(state))
            y_BTD, stats = moe(x_BTD, valid_BT, execution)
            return jnp.sum(jnp.sin(y_BTD) * valid_BT[:, :, None]), (y_BTD * valid_BT[:, :, None], stats.dropped)

        (_, (y_BTD, dropped)), grads = jax.value_and_grad(share, (0, 1), has_aux=True)(state, x_BTD)
        return y_BTD, psum(dropped, TOKEN_AXES), execution.sum_shares(grads[0]), grads[1]

    mesh = make_mesh(MeshConfig(fsdp=1, expert=devices), jax.devices()[:devices])
    specs, rows = execution.specs(state), P(EXPERT)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(rows, P(), specs, rows),
                           check_vma=False)  # fmt: skip
    return jax.device_get(jax.jit(mapped)(state, x_BTD, valid_BT))


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("top", [1, 2])
def test_every_dispatch_gives_the_same_output_and_gradients_when_nothing_is_dropped(top):
    cfg = replace(CFG, experts_per_token=top)
    y, dropped, *grads = run(Execution(grouped_matmul="reference"), 1, cfg)
    assert dropped == 0
    for dispatch in DISPATCHES:
        for devices in (1, 2, 8):
            got = run(Execution(dispatch=dispatch, capacity=ROOMY), devices, cfg)
            assert got[1] == 0, dispatch
            close((got[0], *got[2:]), (y, *grads))


@pytest.mark.parametrize("dispatch", ["all_to_all", "ragged_all_to_all"])
@pytest.mark.parametrize("devices", [1, 4])
def test_what_finds_no_room_is_counted_and_gives_only_the_shared_experts_output(dispatch, devices):
    full = run(Execution(), 1)[0]
    y, dropped, *_ = run(Execution(dispatch=dispatch, capacity=0.5), devices)
    graphdef, state = layer()
    moe = nnx.merge(graphdef, state)
    x_BTD, valid_BT = inputs()
    alone = moe.shared(x_BTD, Execution()) * valid_BT[:, :, None]
    differs = np.abs(y - full).max(axis=2) > 1e-4
    assert differs.sum() == dropped > 0
    np.testing.assert_allclose(y[differs], np.asarray(alone)[differs], atol=1e-5)


def test_padding_takes_no_room():
    """All valid tokens fit in a capacity that valid tokens and padding together would not."""
    x_BTD, _ = inputs()
    graphdef, state = layer(replace(CFG, num_experts=1))
    few = (jnp.arange(T)[None, :] < 8).astype(jnp.float32).repeat(B, 0)
    run = Execution(dispatch="all_to_all", capacity=1 / 3)  # 8 x 24 / 3 = 64 rows, as many as are valid
    _, stats = nnx.merge(graphdef, state)(x_BTD, few, run)
    _, all_stats = nnx.merge(graphdef, state)(x_BTD, jnp.ones((B, T)), run)
    assert stats.dropped == 0
    assert all_stats.dropped == B * T - 64
