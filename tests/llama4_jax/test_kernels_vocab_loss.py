"""The chunked vocabulary loss equals the naive one: values, gradients, split over devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from llama4_jax.kernels.vocab_loss import api, reference

R, D, U, V = 37, 16, 24, 64
TOLERANCE = 1e-5


def inputs(seed: int = 0, rows: int = R):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(rows, D)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, V, rows), jnp.int32)
    hard, soft = (jnp.asarray(rng.uniform(size=rows), jnp.float32) for _ in range(2))
    teacher = (jnp.asarray(rng.normal(size=(rows, U)), jnp.float32), jnp.asarray(rng.normal(size=(U, V)), jnp.float32))
    return h, w, labels, hard, soft, teacher


def assert_close(a, b):
    assert np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b))


@pytest.mark.parametrize("chunk", [8, 37, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_equals_the_naive_loss(chunk, temperature, with_teacher):
    h, w, labels, hard, soft, teacher = inputs()
    extra = dict(soft_R=soft, teacher=teacher, temperature=temperature) if with_teacher else {}

    def total(f, h, w):
        loss, ce, kl = f(h, w, labels, hard, **extra)
        return 3.0 * loss, (ce, kl)

    (value, aux), grads = jax.value_and_grad(partial(total, partial(api.vocab_loss, chunk=chunk)), (0, 1), True)(h, w)
    (want, want_aux), want_grads = jax.value_and_grad(partial(total, reference.vocab_loss), (0, 1), True)(h, w)
    assert_close(value, want)
    for a, b in zip(aux, want_aux, strict=True):
        assert_close(a, b)
    for a, b in zip(grads, want_grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("tokens, expert, tensor", [(4, 1, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2)])
def test_split_over_tokens_and_vocabulary(tokens, expert, tensor):
    """Rows over `tokens` and `expert`, columns over `tensor` and `expert`."""
    h, w, labels, hard, soft, teacher = inputs(rows=40)
    names = ("tokens", "expert", "tensor")
    mesh = jax.make_mesh((tokens, expert, tensor), names, (jax.sharding.AxisType.Auto,) * 3)
    split = dict(columns=("tensor", "expert"), rows=("expert",))

    def local(h, w, labels, hard, soft, teacher_RU, teacher_UV):
        def share(h, w):
            return api.vocab_loss(h, w, labels, hard, soft, (teacher_RU, teacher_UV), chunk=4, **split)

        (loss, aux), (dh, dw) = jax.value_and_grad(lambda *a: (share(*a)[0], share(*a)[1:]), (0, 1), True)(h, w)
        # Shares sum to the whole: the loss over all devices, a gradient over the copies of its array.
        return jax.lax.psum(loss, names), aux, jax.lax.psum(dh, "tensor"), jax.lax.psum(dw, "tokens")

    rows, columns = P(("tokens", "expert")), P(None, ("tensor", "expert"))
    mapped = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(rows, columns, rows, rows, rows, rows, columns),
            out_specs=(P(), (rows, rows), rows, columns), check_vma=False,
        )
    )  # fmt: skip
    loss, (ce, kl), dh, dw = mapped(h, w, labels, hard, soft, *teacher)
    want, want_ce, want_kl = reference.vocab_loss(h, w, labels, hard, soft, teacher)
    want_dh, want_dw = jax.grad(lambda h, w: reference.vocab_loss(h, w, labels, hard, soft, teacher)[0], (0, 1))(h, w)
    assert_close(loss, want)
    assert_close(ce, want_ce)
    assert_close(kl, want_kl)
    assert_close(dh, want_dh)
    assert_close(dw, want_dw)


def test_no_array_of_tokens_times_vocabulary():
    """The largest array in the program is the head or a chunk of logits, far below [R, V]."""
    rows, chunk = 512, 16
    h, w, labels, hard, _, _ = inputs(rows=rows)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: api.vocab_loss(h, w, labels, hard, chunk=chunk)[0], (0, 1)))(h, w)
    sizes = [v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
    assert max(sizes) <= max(rows * D, D * V, chunk * V) <= rows * V / 4


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def test_per_row_losses_carry_no_gradient_and_a_teacher_needs_weights():
    h, w, labels, hard, _, teacher = inputs()
    grad = jax.grad(lambda h: api.vocab_loss(h, w, labels, hard)[1].sum())(h)
    assert not np.any(grad)
    with pytest.raises(ValueError, match="go together"):
        api.vocab_loss(h, w, labels, hard, teacher=teacher)
