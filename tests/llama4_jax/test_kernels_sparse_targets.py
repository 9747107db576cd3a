"""Sparse targets equal a naive twin on any mesh; the unbiased kinds have the teacher's distribution as their mean."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from llama4_jax.kernels.vocab_loss.sparse import SparseTargets, check, entries, sparsify, uniforms

R, U, V = 37, 24, 640
REPEATS = 4_000
FORMS = {"topk": (8, 0), "sample": (0, 12), "stratified": (8, 4)}


def inputs(rows: int = R, vocab: int = V, scale: float = 0.25, seed: int = 0):
    """Hidden states and an unembedding whose products are exact in fp32, so that every mesh has the same logits."""
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.integers(-4, 5, (rows, U)) * scale, jnp.float32)
    w = jnp.asarray(rng.integers(-4, 5, (U, vocab)) * scale, jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
    names = jnp.asarray(rng.integers(0, 2**32, rows), jnp.uint32)
    return h, w, labels, names


def naive(h, w, labels, names, key, kind: str, top: int, draws: int) -> SparseTargets:
    """The twin: whole logits, sorted and summed in float64, the same uniforms."""
    z = np.asarray(h, np.float64) @ np.asarray(w, np.float64)
    u = np.asarray(uniforms(key, names, draws), np.float64)
    lse = np.log(np.exp(z).sum(-1))
    logp = z - lse[:, None]
    p = np.exp(logp)
    order = np.argsort(-z, axis=-1, kind="stable")
    ids, mass, rest = order[:, : max(top, 1)], np.zeros((len(z), max(top, 1))), p.copy()
    if kind != "sample":
        mass = np.take_along_axis(p, ids, axis=-1)
        np.put_along_axis(rest, ids, 0.0, axis=-1)
    left = rest.sum(-1)
    if draws:
        sums = np.cumsum(rest, axis=-1)
        drawn = np.stack([np.searchsorted(s, x * s[-1], side="right") for s, x in zip(sums, u, strict=True)])
        each = np.full(len(z), 1 / draws) if kind == "sample" else left / draws
        ids = np.concatenate([ids, drawn], axis=1)
        mass = np.concatenate([mass, np.repeat(each[:, None], draws, axis=1)], axis=1)
    tail = left if kind == "topk" else np.zeros_like(left)
    label = logp[np.arange(len(z)), np.asarray(labels)]
    return SparseTargets(ids, mass, tail, lse, -(p * logp).sum(-1), label, np.ones(len(z), bool))


def assert_same(got: SparseTargets, want: SparseTargets):
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.present, want.present)
    for name in ("mass", "tail", "lse", "entropy", "label_logp"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("chunk", [8, 1024])
@pytest.mark.parametrize("kind", FORMS)
def test_equals_the_naive_twin(kind, chunk):
    top, draws = FORMS[kind]
    args = (*inputs(), jax.random.key(3))
    got = jax.jit(partial(sparsify, kind=kind, top=top, draws=draws, chunk=chunk))(*args)
    assert got.ids.shape == (R, entries(kind, top, draws))
    assert_same(got, naive(*args, kind, top, draws))
    assert np.array_equal(got.ids[:, 0], jnp.argmax(args[0] @ args[1], axis=-1))
    np.testing.assert_allclose(got.mass.sum(-1) + got.tail, 1, rtol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("tokens, expert, tensor", [(1, 1, 8), (2, 4, 1), (2, 2, 2)])
def test_split_over_tokens_and_vocabulary(kind, tokens, expert, tensor):
    """Rows over `tokens` and `expert`, columns over `tensor` and `expert`: ids and draws are those of one device."""
    top, draws = FORMS[kind]
    h, w, labels, names = inputs(rows=40)
    key, axes = jax.random.key(3), ("tokens", "expert", "tensor")
    mesh = jax.make_mesh((tokens, expert, tensor), axes, (jax.sharding.AxisType.Auto,) * 3)
    form = dict(kind=kind, top=top, draws=draws, chunk=4)
    local = partial(sparsify, **form, columns=("tensor", "expert"), rows=("expert",))
    rows, columns = P(("tokens", "expert")), P(None, ("tensor", "expert"))
    specs = (rows, columns, rows, rows, P())
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False))
    got = jax.device_get(mapped(h, w, labels, names, key))
    assert_same(got, naive(h, w, labels, names, key, kind, top, draws))
    alone = sparsify(h, w, labels, names, key, **form)
    assert np.array_equal(got.ids, alone.ids)


def measure(t: SparseTargets, vocab: int) -> np.ndarray:
    """[R, V], of the entries alone."""
    out = np.zeros((len(t.lse), vocab))
    rows, columns = np.nonzero(np.asarray(t.ids) >= 0)
    np.add.at(out, (rows, np.asarray(t.ids)[rows, columns]), np.asarray(t.mass)[rows, columns])
    return out


def moments(kind: str, top: int, draws: int, repeats: int):
    """(mean measure, its standard error, p), each [rows, V], over draws that differ by key and by the row's name."""
    vocab = 64
    h, w, labels, _ = inputs(rows=4, vocab=vocab)
    p = np.exp(np.asarray(jax.nn.log_softmax(h @ w, axis=-1), np.float64))
    names = jnp.arange(repeats, dtype=jnp.uint32)

    @jax.jit
    def many(key):
        def one(h_U, label):
            spread = jnp.broadcast_to(h_U, (repeats, U))
            return sparsify(spread, w, jnp.full(repeats, label), names, key, kind, top, draws)

        return jax.vmap(one)(h, labels)

    drawn = jax.device_get(many(jax.random.key(5)))
    means, errors = [], []
    for row in range(4):
        x = measure(SparseTargets(*(field[row] for field in drawn)), vocab)
        means.append(x.mean(0))
        errors.append(x.std(0) / np.sqrt(repeats))
    return np.stack(means), np.stack(errors), p


def largest_deviation(kind: str, top: int, draws: int) -> float:
    """In standard errors; a place of the exact part has an error of rounding only, and counts against 1e-6."""
    mean, error, p = moments(kind, top, draws, REPEATS)
    # An id that is expected less than a few times in all has no normal distribution.
    often = p * REPEATS * max(draws, 1) > 20
    return float((np.abs(mean - p) / np.maximum(error, 1e-6))[often].max())


@pytest.mark.parametrize("kind, top, draws", [("sample", 0, 12), ("stratified", 8, 4), ("stratified", 1, 3)])
def test_the_mean_over_many_draws_is_p(kind, top, draws):
    """256 places: their largest deviation is above 4.5 standard errors once in six hundred."""
    assert largest_deviation(kind, top, draws) < 4.5


def test_the_largest_alone_are_not_unbiased():
    """The control: what the test above would say of a biased measure."""
    assert largest_deviation("topk", 12, 0) > 100


def test_stratified_errs_less_than_a_sample_of_as_many():
    """Root mean square of the error of the gradient's p: 8 + 4 entries against 12 draws (and 12 + 0, biased)."""
    rms = {}
    for kind, top, draws in [("stratified", 8, 4), ("sample", 0, 12)]:
        _, error, _ = moments(kind, top, draws, 2_000)
        rms[kind] = np.sqrt((error**2).sum(-1).mean() * 2_000)
    assert rms["stratified"] < 0.7 * rms["sample"], rms


def test_nothing_is_left_to_draw():
    """A teacher that is certain: its other entries are unused, and nothing is drawn twice over."""
    h, w = jnp.ones((3, 1)), jnp.where(jnp.arange(64) == 7, 0.0, -1e4)[None]
    names, labels = jnp.arange(3, dtype=jnp.uint32), jnp.full(3, 7)
    t = sparsify(h, w, labels, names, jax.random.key(0), "stratified", 1, 4)
    assert np.array_equal(t.ids, [[7, -1, -1, -1, -1]] * 3) and np.array_equal(t.mass, [[1, 0, 0, 0, 0]] * 3)
    assert not np.any(t.entropy) and not np.any(t.label_logp)
    t = sparsify(h, w, labels, names, jax.random.key(0), "sample", 0, 4)
    assert np.all(np.asarray(t.ids) == 7) and np.all(t.mass.sum(-1) == 1)


def test_no_array_of_tokens_times_vocabulary():
    rows, chunk = 512, 16
    args = (*inputs(rows=rows), jax.random.key(0))
    jaxpr = jax.make_jaxpr(partial(sparsify, kind="stratified", top=2, draws=1, chunk=chunk))(*args)
    sizes = [v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
    assert max(sizes) <= 2 * chunk * V <= rows * V / 16


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


@pytest.mark.parametrize(
    "form, complaint",
    [(("tpk", 8, 0), "one of topk, sample, stratified"), (("topk", 0, 0), "at least 1"), (("topk", 8, 4), "no draws"),
     (("sample", 8, 4), "no top"), (("stratified", 8, 0), "at least 1 draw")],
)  # fmt: skip
def test_what_is_no_kind_is_refused(form, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(*form)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="no draws"):
        sparsify(*inputs(), jax.random.key(0), "topk", 8, 4)
    with pytest.raises(ValueError, match="vocabulary of 640"):
        sparsify(*inputs(), jax.random.key(0), "topk", 641, 0)
