"""The schedule's corners, and what decays."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.axes import is_variable
from llama4_jax.config import tiny_maverick
from llama4_jax.text import abstract
from training.config import OptimizerConfig
from training.optimizer import decays, learning_rate, make_optimizer


def test_schedule_warms_up_holds_and_falls():
    cfg = OptimizerConfig(learning_rate=1.0, warmup=10, decay=0.2, final=0.1)
    rate = [float(learning_rate(cfg, 100)(step)) for step in range(101)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rate[9:81], 1.0)
    np.testing.assert_allclose(rate[90], 0.55, rtol=1e-6)
    np.testing.assert_allclose(rate[100], 0.1, rtol=1e-6)
    assert all(a >= b for a, b in pairwise(rate[80:]))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_schedule_without_and_with_nothing_but_decay(decay):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=0, decay=decay, final=0.5), 10)
    np.testing.assert_allclose(rate(5), 1.0 if decay == 0 else 0.75)


def test_matrices_decay_and_scales_do_not_though_layers_are_stacked():
    params = nnx.split(abstract(tiny_maverick()))[1]
    chosen = decays(params)
    by_name = {
        jax.tree_util.keystr(path): leaf.get_value()
        for path, leaf in jax.tree_util.tree_leaves_with_path(chosen, is_leaf=is_variable)
    }
    assert len(by_name) == len(jax.tree.leaves(params))
    for name, value in by_name.items():
        assert value == ("scale" not in name), name


def test_one_step_is_adamw_by_hand():
    cfg = OptimizerConfig(learning_rate=0.1, warmup=1, decay=0.0, weight_decay=0.5, clip=1.0)
    optimizer = make_optimizer(cfg, 10)
    params = {"w": nnx.Param(jnp.array([[3.0, 4.0]]), axes=("embed", "ffn"), fp32=False)}
    grads = jax.tree.map(lambda p: jnp.array([[6.0, -8.0]]), params)  # norm 10: clipped to [0.6, -0.8]
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first step is the sign of the gradient; the decay is decoupled and not clipped.
    want = -0.1 * (np.array([[1.0, -1.0]]) + 0.5 * np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], want, rtol=1e-5)
