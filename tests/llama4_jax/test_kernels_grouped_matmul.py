"""Every backend of the grouped matmul is the definition, in value and in gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.grouped_matmul import megablox, reference
from llama4_jax.kernels.grouped_matmul.api import BACKENDS, grouped_matmul, rows_multiple

D, F = 12, 10
ANYWHERE = ("blocks", "reference")  # the GPU kernel has its own tests (test_kernels_gpu.py)
GROUPS = {  # in multiples of the backend's rows
    "even": (2, 2, 2, 2),
    "empty_groups": (0, 3, 0, 0, 1, 0),
    "all_in_the_last": (0, 0, 5),
    "one_group": (4,),
    "only_empty_but_one_first": (3, 0, 0),
}


def operands(sizes: np.ndarray, spare: int = 0):
    rng = np.random.default_rng(0)
    x_RD = rng.standard_normal((sizes.sum() + spare, D), np.float32)
    w_EDF = rng.standard_normal((len(sizes), D, F), np.float32)
    g_RF = rng.standard_normal((sizes.sum() + spare, F), np.float32)
    return x_RD, w_EDF, g_RF


def by_loop(x_RD: np.ndarray, w_EDF: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    starts = np.cumsum(sizes) - sizes
    return np.concatenate([x_RD[s : s + n] @ w for s, n, w in zip(starts, sizes, w_EDF, strict=True)])


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("backend", ANYWHERE)
def test_value_and_gradients_are_those_of_a_loop_over_groups(backend, groups):
    sizes = np.array(GROUPS[groups]) * rows_multiple(backend)
    x_RD, w_EDF, g_RF = operands(sizes)

    def f(x_RD, w_EDF):
        return grouped_matmul(x_RD, w_EDF, jnp.asarray(sizes), backend)

    out_RF, vjp = jax.vjp(jax.jit(f), x_RD, w_EDF)
    dx_RD, dw_EDF = vjp(g_RF)
    ends = np.cumsum(sizes)
    rows = [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]
    want_dw_EDF = np.stack([x_RD[r].T @ g_RF[r] for r in rows])
    for got, want in (
        (out_RF, by_loop(x_RD, w_EDF, sizes)),
        (dx_RD, by_loop(g_RF, w_EDF.transpose(0, 2, 1), sizes)),
        (dw_EDF, want_dw_EDF),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    for e, n in enumerate(sizes):  # an expert that no token visits gets no gradient at all
        assert n or not np.any(dw_EDF[e])


@pytest.mark.parametrize("backend", ANYWHERE)
def test_rows_behind_the_last_group_change_nothing(backend):
    """The dispatch leaves spare rows at the end (experts' groups are padded): they must not reach the others."""
    multiple = rows_multiple(backend)
    sizes, spare = np.array([1, 0, 2]) * multiple, 2 * multiple
    x_RD, w_EDF, g_RF = operands(sizes, spare)
    used = int(sizes.sum())
    x_RD[used:] = 0  # as the dispatch fills them
    g_RF[used:] = 0

    def f(x_RD, w_EDF):
        return grouped_matmul(x_RD, w_EDF, jnp.asarray(sizes), backend)

    out_RF, vjp = jax.vjp(f, x_RD, w_EDF)
    short_RF, short_vjp = jax.vjp(f, x_RD[:used], w_EDF)
    np.testing.assert_allclose(out_RF[:used], short_RF, rtol=1e-6, atol=1e-6)
    assert not np.any(out_RF[used:])
    for got, want in zip(vjp(g_RF), short_vjp(g_RF[:used]), strict=True):
        np.testing.assert_allclose(got[:used] if got.ndim == 2 else got, want, rtol=1e-5, atol=1e-5)


def test_megablox_is_the_definition_whatever_lies_behind_the_last_group():
    """The TPU kernel, interpreted: groups of any size, spare rows of NaN in the operand and in the cotangent."""
    sizes = np.array([300, 0, 1, 512, 99])
    x_RD, w_EDF, g_RF = operands(sizes, spare=1024 - sizes.sum())
    used = int(sizes.sum())
    x_RD[used:] = g_RF[used:] = np.nan
    out_RF, vjp = jax.vjp(lambda x, w: megablox.grouped_matmul(x, w, jnp.asarray(sizes), interpret=True), x_RD, w_EDF)
    want_RF, want_vjp = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, jnp.asarray(sizes)), x_RD[:used], w_EDF)
    got, want = vjp(jnp.asarray(g_RF)), want_vjp(g_RF[:used])
    for a, b in ((out_RF[:used], want_RF), (got[0][:used], want[0]), (got[1], want[1])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=f"no grouped matmul 'gmm': there are {', '.join(BACKENDS)}"):
        grouped_matmul(*map(jnp.asarray, operands(np.array([2]))[:2]), jnp.array([2]), "gmm")
