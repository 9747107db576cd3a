"""The chunked vocabulary loss equals the naive one: values, gradients, split over devices, for every divergence."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from llama4_jax.kernels.vocab_loss import api, reference
from llama4_jax.kernels.vocab_loss.comparison import Comparison, Dense
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets

R, D, U, V = 37, 16, 24, 64
TOLERANCE = 1e-5
KINDS = ("kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd")
FORMS = {
    **{kind: Comparison(kind, skew=0.3, measure=True) for kind in KINDS},
    **{f"{kind} at 2": Comparison(kind, skew=0.3, temperature=2.0) for kind in KINDS},
    **{f"kl by {focus}": Comparison(focus=focus) for focus in ("confidence", "student_entropy", "disagreement")},
    "measured at 2 by disagreement": Comparison("jsd", 0.5, 2.0, "disagreement", measure=True),
}


def inputs(seed: int = 0, rows: int = R):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(rows, D)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(D, V)) / 2, jnp.float32)
    labels = jnp.asarray(rng.integers(0, V, rows), jnp.int32)
    hard, soft = (jnp.asarray(rng.uniform(size=rows), jnp.float32) for _ in range(2))
    hidden, unembedding = rng.normal(size=(rows, U)), rng.normal(size=(U, V)) / 2
    return h, w, labels, hard, soft, Dense(jnp.asarray(hidden, jnp.float32), jnp.asarray(unembedding, jnp.float32))


def sparse(bucket: bool, labels, teacher: Dense, seed: int = 0) -> SparseTargets:
    """Six entries of the teacher's distribution, one unused and one row without: the largest, or draws beside them."""
    rng = np.random.default_rng(seed)
    logits = np.asarray(teacher.hidden @ teacher.unembedding, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[:, None])
    ids = np.argsort(-p, axis=1)[:, :6]
    mass = np.take_along_axis(p, ids, 1)
    ids[:, 5], mass[:, 5] = -1, 0
    if not bucket:  # two draws, which may be of the same id, carry what the first three leave
        ids[:, 3:5] = rng.integers(0, V, (len(p), 2))
        mass[:, 3:5] = (1 - mass[:, :3].sum(1, keepdims=True)) / 2
    present = np.arange(len(p)) != 2
    tail = np.where(bucket, 1 - mass.sum(1), 0)
    entropy, label_logp = -(p * np.log(p)).sum(1), np.log(np.take_along_axis(p, np.asarray(labels)[:, None], 1)[:, 0])
    floats = [jnp.asarray(x, jnp.float32) for x in (mass, tail, lse, entropy, label_logp)]
    return SparseTargets(jnp.asarray(ids, jnp.int32), *floats, present=jnp.asarray(present))


def assert_close(a, b):
    assert np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b))


def assert_same_stats(got, want):
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or np.max(np.abs(a - b)) <= TOLERANCE * max(np.max(np.abs(b)), 1), name


def assert_equal(loss, *args, **extra):
    """`loss` gives what the reference does: value, statistics and gradients."""

    def total(f, h, w):
        value, stats = f(h, w, *args[2:], **extra)
        return 3.0 * value, stats

    def of(f):
        return jax.jit(jax.value_and_grad(partial(total, f), (0, 1), True))(*args[:2])

    ((value, stats), grads), ((want, want_stats), want_grads) = of(loss), of(reference.vocab_loss)
    assert_close(value, want)
    assert_same_stats(stats, want_stats)
    for a, b in zip(grads, want_grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("chunk", [8, 37, 1024])
@pytest.mark.parametrize("measure", [False, True])
def test_labels_alone_equal_the_naive_loss(chunk, measure):
    assert_equal(partial(api.vocab_loss, chunk=chunk), *inputs()[:4], comparison=Comparison(measure=measure))


@pytest.mark.parametrize("name", [*FORMS, "interpolated kl", "interpolated jsd at 2"])
def test_every_form_equals_the_naive_loss(name):
    form, toward = FORMS[name.removeprefix("interpolated ")], jnp.float32(0.4) if "interpolated" in name else None
    assert_equal(partial(api.vocab_loss, chunk=8), *inputs(), comparison=form, toward=toward)


@pytest.mark.parametrize("focus", ["none", "confidence", "student_entropy"])
@pytest.mark.parametrize("bucket", [True, False])
def test_sparse_targets_equal_the_naive_loss(bucket, focus):
    *args, teacher = inputs()
    targets = sparse(bucket, args[2], teacher)
    assert_equal(partial(api.vocab_loss, chunk=8), *args, targets, comparison=Comparison(focus=focus, measure=True))


def test_all_entries_are_the_whole_distribution():
    """Sparse targets that hold every id give what the teacher's hidden states do."""
    h, w, labels, hard, soft, teacher = inputs()
    logits = teacher.hidden @ teacher.unembedding
    log_p = jax.nn.log_softmax(logits)
    ids = jnp.argsort(-log_p, axis=1).astype(jnp.int32)
    entropy, label = -(jnp.exp(log_p) * log_p).sum(1), jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
    mass = jnp.exp(jnp.take_along_axis(log_p, ids, 1))
    all_of_them = SparseTargets(
        ids, mass, jnp.zeros(R), jax.nn.logsumexp(logits, axis=1), entropy, label, jnp.ones(R, bool)
    )
    for focus in ("none", "confidence"):
        form = Comparison(focus=focus, measure=True)
        (loss, got), dh = jax.value_and_grad(lambda h: api.vocab_loss(h, w, labels, hard, soft, all_of_them, form), has_aux=True)(h)  # fmt: skip # noqa: E501, B023
        (want, dense), want_dh = jax.value_and_grad(lambda h: api.vocab_loss(h, w, labels, hard, soft, teacher, form), has_aux=True)(h)  # fmt: skip # noqa: E501, B023
        assert_close(loss, want)
        assert_close(dh, want_dh)
        assert_same_stats(got, dense._replace(reverse_kl=None))


MESHES = [(4, 1, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2)]


@pytest.mark.parametrize(
    "form, tokens, expert, tensor",
    [(form, *MESHES[-1]) for form in (*FORMS, "sparse, bucket", "sparse, draws", "interpolated")]
    + [(form, *mesh) for form in ("kl", "jsd", "sparse, bucket") for mesh in MESHES[:-1]],
)
def test_split_over_tokens_and_vocabulary(form, tokens, expert, tensor):
    """Rows over `tokens` and `expert`, columns over `tensor` and `expert`."""
    h, w, labels, hard, soft, dense = inputs(rows=40)
    taught = sparse("bucket" in form, labels, dense) if "sparse" in form else dense
    toward = jnp.float32(0.4) if form == "interpolated" else None
    form = FORMS.get(form, Comparison(measure=True))
    names = ("tokens", "expert", "tensor")
    mesh = jax.make_mesh((tokens, expert, tensor), names, (jax.sharding.AxisType.Auto,) * 3)
    split = dict(columns=("tensor", "expert"), rows=("expert",))

    def local(h, w, labels, hard, soft, taught):
        def share(h, w):
            return api.vocab_loss(h, w, labels, hard, soft, taught, form, toward, chunk=4, **split)

        (loss, stats), (dh, dw) = jax.value_and_grad(share, (0, 1), True)(h, w)
        # Shares sum to the whole: the loss over all devices, a gradient over the copies of its array.
        return jax.lax.psum(loss, names), stats, jax.lax.psum(dh, "tensor"), jax.lax.psum(dw, "tokens")

    rows, columns = P(("tokens", "expert")), P(None, ("tensor", "expert"))
    mapped = jax.jit(
        jax.shard_map(
            local, mesh=mesh,
            in_specs=(rows, columns, rows, rows, rows, Dense(rows, columns) if taught is dense else rows),
            out_specs=(P(), rows, rows, columns), check_vma=False,
        )
    )  # fmt: skip
    loss, stats, dh, dw = mapped(h, w, labels, hard, soft, taught)
    naive = partial(reference.vocab_loss, labels_R=labels, hard_R=hard, soft_R=soft, teacher=taught, comparison=form,
                    toward=toward)  # fmt: skip
    (want, want_stats), (want_dh, want_dw) = jax.value_and_grad(naive, (0, 1), True)(h, w)
    assert_close(loss, want)
    assert_same_stats(stats, want_stats)
    assert_close(dh, want_dh)
    assert_close(dw, want_dw)


def test_gradients_vanish_where_the_student_is_the_teacher():
    """Of every divergence, and of the tail's bucket; not of draws, which are right on average alone."""
    _, _, labels, _, soft, teacher = inputs()
    none = jnp.zeros(R)
    targets = {kind: (teacher, form) for kind, form in FORMS.items()} | {
        "bucket": (sparse(True, labels, teacher), Comparison())
    }
    for name, (taught, form) in targets.items():
        norm = jax.grad(lambda h: api.vocab_loss(h, teacher.unembedding, labels, none, soft, taught, form)[0])  # noqa: B023
        assert np.max(np.abs(norm(teacher.hidden))) < 1e-5, name
    draws = sparse(False, labels, teacher)
    grad = jax.grad(lambda h: api.vocab_loss(h, teacher.unembedding, labels, none, soft, draws)[0])(teacher.hidden)
    assert np.max(np.abs(grad)) > 1e-2


def test_soft_weights_leave_the_hard_gradient_unskewed():
    """Averaged over labels y ~ p_data, the gradient is h (q - p_data) + s g t^2 dD/dz: no focus turns the former.

    The control weighs labels by how likely the student finds them, which does.
    """
    h, w, labels, _, soft, teacher = (x[:1] if i not in (1, 5) else x for i, x in enumerate(inputs()))
    teacher = Dense(teacher.hidden[:1], teacher.unembedding)
    data = jax.nn.softmax(jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32))
    every = jnp.arange(V, dtype=jnp.int32)
    q = jax.nn.softmax(h @ w)[0]

    def expected(hard, soft, form):
        """E over labels of dL/dh; `hard` by label."""

        def one(label, hard):
            return jax.grad(lambda h: api.vocab_loss(h, w, label[None], hard[None], soft, teacher, form)[0])(h)

        return jnp.einsum("v,vrd->rd", data, jax.jit(jax.vmap(one))(every, hard))

    def soft_part(form):
        return jax.grad(lambda h: api.vocab_loss(h, w, labels, jnp.zeros(1), soft, teacher, form)[0])(h)

    unskewed = 0.3 * (q - data) @ w.T
    for focus in ("none", "confidence", "student_entropy", "disagreement"):
        form = Comparison(focus=focus)
        assert_close(expected(jnp.full(V, 0.3), soft, form) - soft_part(form), unskewed[None])
    gated = expected(0.3 * q / jnp.sum(q * data), soft, Comparison()) - soft_part(Comparison())
    cosine = jnp.vdot(gated, unskewed) / jnp.linalg.norm(gated) / jnp.linalg.norm(unskewed)
    assert cosine < 0.9


@pytest.mark.parametrize("taught", [False, True])
def test_no_array_of_tokens_times_vocabulary(taught):
    """The largest array in the program is a head or a chunk of logits, far below [R, V]."""
    rows, chunk = 512, 16
    h, w, labels, hard, soft, teacher = inputs(rows=rows)
    extra: dict[str, Any] = dict(soft_R=soft, teacher=teacher, comparison=Comparison(measure=True)) if taught else {}
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: api.vocab_loss(h, w, labels, hard, chunk=chunk, **extra)[0], (0, 1)))(
        h, w
    )
    sizes = [v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
    assert max(sizes) <= max(rows * U, U * V, 3 * chunk * V) <= rows * V / 2


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def test_statistics_carry_no_gradient():
    h, w, labels, hard, soft, teacher = inputs()
    form = Comparison(measure=True)
    grad = jax.grad(lambda h: sum(x.sum() for x in api.vocab_loss(h, w, labels, hard, soft, teacher, form)[1]))(h)
    assert not np.any(grad)


def test_what_cannot_be_is_refused():
    h, w, labels, hard, soft, teacher = inputs()
    with pytest.raises(ValueError, match="go together"):
        api.vocab_loss(h, w, labels, hard, teacher=teacher)
    few = sparse(True, labels, teacher)
    for form in (Comparison("reverse_kl"), Comparison(temperature=2.0), Comparison(focus="disagreement")):
        with pytest.raises(ValueError, match="sparse targets"):
            api.vocab_loss(h, w, labels, hard, soft, few, form)
    with pytest.raises(ValueError, match="interpolation"):
        api.vocab_loss(h, w, labels, hard, soft, few, toward=jnp.float32(0.5))


def test_a_live_teacher_over_a_wide_vocabulary_takes_fewer_rows_at_a_time():
    """Half of the rows of labels alone, and no fewer once the vocabulary is split."""
    whole, split = 202_048, 202_048 // 8
    assert api.default_chunk(whole, live_teacher=True) * 2 == api.default_chunk(whole, live_teacher=False)
    assert api.default_chunk(split, live_teacher=True) == api.default_chunk(split, live_teacher=False)
