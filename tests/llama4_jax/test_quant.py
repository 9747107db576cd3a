"""Matmuls in eight bits against a quantisation written out in NumPy, and what they leave alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama4_jax import quant
from llama4_jax.axes import EXPERT, Execution
from llama4_jax.config import tiny_scout
from llama4_jax.kernels.grouped_matmul.api import grouped_matmul
from llama4_jax.moe import MoE
from training.config import MeshConfig
from training.mesh import make_mesh

SPECS = {
    "BTD,DNH->BTNH": ((2, 5, 48), (48, 3, 4)),
    "BTNH,NHD->BTD": ((2, 5, 3, 16), (3, 16, 8)),
    "BTD,DF->BTF": ((2, 5, 48), (48, 12)),
    "ECD,EDF->ECF": ((3, 8, 48), (3, 48, 12)),
}
TOP = {np.int8: 127.5, ml_dtypes.float8_e4m3fn: 448.0, ml_dtypes.float8_e5m2: 57344.0}
TYPES = {"fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2), "int8": (np.int8, np.int8)}
NEAR = {"fp8": (0.05, 0.08), "int8": (0.015, 0.1)}
"""Bounds of relative errors in Frobenius's norm: forward, gradients. Tokens differ e-fold in size here, which one scale
for all of them, in a weight's gradient, bears worse in int8 than in floating point."""


def operands(spec: str, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and the gradient of the result; tokens and columns differ in size, and one token is zeros."""
    rng = np.random.default_rng(0)
    (x_shape, w_shape), out = SPECS[spec], spec.split("->")[1]
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)
    x *= np.exp(rng.normal(size=x_shape[:2]))[(..., *[None] * (len(x_shape) - 2))]
    w *= np.exp(rng.normal(size=w_shape[-1:]))
    x[0, 1] = 0
    size = dict(zip(spec.replace("->", ",").split(",")[0], x_shape, strict=True))
    size |= dict(zip(spec.replace("->", ",").split(",")[1], w_shape, strict=True))
    g = rng.normal(size=[size[letter] for letter in out])
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(g, dtype)


def rounded(x: np.ndarray, summed: list[int], dtype) -> tuple[np.ndarray, np.ndarray]:
    """(q, s): eight bits and the scale of each index that is not summed, x being about q s."""
    s = np.abs(x).max(axis=tuple(summed), keepdims=True) / np.float32(TOP[dtype])
    s = np.where(s < np.sqrt(np.finfo(np.float32).tiny), 1, s).astype(np.float32)
    if dtype == np.int8:
        return np.clip(np.rint(x / s), -128, 127), s
    return np.clip(x / s, -TOP[dtype], TOP[dtype]).astype(dtype).astype(np.float32), s


def along(s: np.ndarray, letters: str, others: str) -> np.ndarray:
    """A scale of an operand with `letters`, to be multiplied with an array of `others`."""
    kept = [a for a in letters if a in others]
    s = np.einsum(f"{letters}->{''.join(kept)}", s)  # what is summed has size 1
    order = np.einsum(f"{''.join(kept)}->{''.join(a for a in others if a in kept)}", s)
    return order.reshape([order.shape[[a for a in others if a in kept].index(a)] if a in kept else 1 for a in others])


def by_hand(spec: str, x, w, g, kind: str):
    """Result and both gradients, sums in fp64."""
    forward, backward = TYPES[kind]
    (xs, ws), out = spec.split("->")[0].split(","), spec.split("->")[1]
    summed = [a for a in xs if a in ws and a not in out]
    x, w, g = (np.asarray(a, np.float32) for a in (x, w, g))
    q_x, s_x = rounded(x, [xs.index(a) for a in summed], forward)
    q_w, s_w = rounded(w, [ws.index(a) for a in summed], forward)

    def product(a, at, b, bt, to):
        return np.einsum(f"{at},{bt}->{to}", a.astype(np.float64), b.astype(np.float64))

    y = product(q_x, xs, q_w, ws, out) * along(s_x, xs, out) * along(s_w, ws, out)
    q, s = rounded(g * along(s_w, ws, out), [i for i, a in enumerate(out) if a not in xs], backward)
    dx = product(q, out, q_w, ws, xs) * along(s, out, xs)
    q, s = rounded(g * along(s_x, xs, out), [i for i, a in enumerate(out) if a not in ws], backward)
    dw = product(q, out, q_x, xs, ws) * along(s, out, ws)
    return y, dx, dw


def run(spec: str, kind: quant.Quant, x, w, g):
    y, vjp = jax.vjp(partial(quant.einsum, spec, quant=kind), x, w)
    return (y, *vjp(g))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("spec", SPECS)
def test_result_and_gradients_are_those_of_a_quantisation_by_hand(spec, kind):
    """The largest entry is 127.5 steps of int8: a scale's last bit decides whether 127 or 128 of them stand for it,
    so a few steps are allowed there (and none in the next test)."""
    given, tolerance = operands(spec), dict(fp8=1e-6, int8=1 / 32)[kind]
    for got, want in zip(run(spec, kind, *given), by_hand(spec, *given, kind), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=tolerance * np.abs(want).max())


def test_int8_is_the_quantisation_by_hand_to_the_last_bit():
    """Where scales are powers of two nothing but the rounding to eight bits is rounded, forward or backward."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.uniform(-127, 127, shape) for shape in ((12, 48), (48, 7), (12, 7)))
    x[:, 5] = w[3] = g[4] = g[:, 2] = 127.5
    s_x, s_w = 2.0 ** -rng.integers(0, 4, (12, 1)), 2.0 ** -rng.integers(0, 4, (1, 7))
    s_x[4] = s_w[:, 2] = 1  # the largest, so that scales of the gradients are 1
    x, w, g = (jnp.asarray(a, jnp.float32) for a in (x * s_x, w * s_w, g))
    for got, want in zip(run("RD,DF->RF", "int8", x, w, g), by_hand("RD,DF->RF", x, w, g, "int8"), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("spec", SPECS)
def test_eight_bits_are_near_the_compute_dtype(spec, kind, dtype):
    given = operands(spec, dtype)
    results = zip(run(spec, kind, *given), run(spec, "none", *operands(spec)), strict=True)
    for (got, want), bound in zip(results, (NEAR[kind][0], *[NEAR[kind][1]] * 2), strict=True):
        assert got.dtype == dtype
        error = np.linalg.norm(np.float64(got - want)) / np.linalg.norm(np.float64(want))
        assert 1e-3 < error < bound, error


def test_grouped_matmul_by_blocks_is_that_of_each_groups_rows():
    rng, sizes = np.random.default_rng(0), np.array([256, 0, 128])
    x = jnp.asarray(rng.normal(size=(384, 48)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 48, 12)), jnp.float32)
    einsum = Execution(quant="fp8").einsum
    got, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), "blocks", einsum), x, w)
    want = np.concatenate([einsum("RD,DF->RF", x[:256], w[0]), einsum("RD,DF->RF", x[256:], w[2])])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    dx, dw = vjp(jnp.ones_like(got))
    np.testing.assert_allclose(dx[:256], np.ones((256, 12)) @ np.asarray(w[0]).T, atol=1)
    assert np.abs(dw[1]).max() == 0 < np.abs(dw[0]).max()


# --- A MoE layer under every dispatch

CFG = replace(tiny_scout(), embed_dim=32, expert_dim=48, num_experts=8)


def moe(execution: Execution, devices: int):
    """(y, gradients of weights) of sum(sin(y)) over an expert axis of `devices`."""
    graphdef, state = nnx.split(MoE(CFG, nnx.Rngs(1)))
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24, 32)), jnp.float32)

    def local(state, x_BTD):
        def share(state):
            y_BTD, _ = nnx.merge(graphdef, execution.fetch(state))(x_BTD, jnp.ones(x_BTD.shape[:2]), execution)
            return jnp.sum(jnp.sin(50 * y_BTD)), y_BTD

        (_, y_BTD), grads = jax.value_and_grad(share, has_aux=True)(state)
        return y_BTD, execution.sum_shares(grads)

    mesh = make_mesh(MeshConfig(fsdp=1, expert=devices), jax.devices()[:devices])
    specs = execution.specs(state)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(EXPERT)), out_specs=(P(EXPERT), specs), check_vma=False)
    y_BTD, grads = jax.device_get(jax.jit(mapped)(state, x_BTD))
    return y_BTD, {"/".join(map(str, path)): g for path, g in nnx.to_flat_state(grads)}


def error(got, want) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("kind, same, rounding, near", [("fp8", 1e-5, 0.06, 0.1), ("int8", 0.01, 0.01, 0.02)])
def test_every_dispatch_and_mesh_gives_the_same_layer(kind, same, rounding, near):
    """Outputs exactly, since a token's scale is its own (int8: but for 127 or 128, above); weights' gradients but for
    the rounding of shards."""
    plain, plain_grads = moe(Execution(), 1)
    y, grads = moe(Execution(quant=kind), 1)
    assert 1e-3 < error(y, plain) < near
    for dispatch, devices in (("fsdp", 4), ("all_to_all", 1), ("all_to_all", 4), ("ragged_all_to_all", 4)):
        other, others = moe(Execution(quant=kind, dispatch=dispatch, capacity=8.0), devices)
        assert error(other, y) < same, (dispatch, devices)
        for name, g in others.items():
            assert error(g.get_value(), grads[name].get_value()) < rounding, (dispatch, devices, name)
            assert error(g.get_value(), plain_grads[name].get_value()) < near, (dispatch, devices, name)


# --- What it costs where it is off, and what it refuses


def test_without_it_the_program_is_the_one_without_a_hook():
    x, w, _ = operands("BTD,DF->BTF")
    plain = str(jax.make_jaxpr(lambda x, w: jnp.einsum("BTD,DF->BTF", x, w))(x, w))
    assert str(jax.make_jaxpr(partial(Execution().einsum, "BTD,DF->BTF"))(x, w)) == plain
    assert str(jax.make_jaxpr(partial(Execution().einsum, "...D,DF->...F"))(x, w)) == plain
    assert str(jax.make_jaxpr(lambda x, w: x @ w)(x, w)) == plain


@pytest.mark.parametrize("backend", ["megablox", "triton", "reference"])
def test_a_grouped_matmul_that_cannot_is_refused_by_name(backend):
    with pytest.raises(ValueError, match=f"quant fp8 cannot go through grouped_matmul {backend}.*all_to_all.*blocks"):
        Execution(quant="fp8", grouped_matmul=backend)
    with pytest.raises(ValueError, match="ragged_all_to_all"):
        Execution(quant="int8", grouped_matmul=backend, dispatch="ragged_all_to_all")
    Execution(quant="fp8", grouped_matmul=backend, dispatch="all_to_all")
    x, w = jnp.ones((512, 8)), jnp.ones((1, 8, 8))
    with pytest.raises(ValueError, match=f"'{backend}' is no einsum, .* blocks"):
        grouped_matmul(x, w, jnp.array([512]), backend, Execution(quant="fp8").einsum)


def test_without_qwix_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix._src.core", None)
    quant._dot_general.cache_clear()
    with pytest.raises(ImportError, match=r"^quant fp8 needs qwix .*pip install -e '\.\[quant\]'$"):
        Execution(quant="fp8").einsum("BD,DF->BF", jnp.ones((2, 3)), jnp.ones((3, 4)))
