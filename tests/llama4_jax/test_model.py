"""What the whole model must satisfy, whatever its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.packing import Document, build_batch, cut, pack
from llama4_jax.axes import Execution, is_variable
from llama4_jax.config import MODELS, LayerKind, ModelConfig, Rope, behemoth, maverick, scout, tiny_maverick, tiny_scout
from llama4_jax.kernels.attention import reference
from llama4_jax.kernels.attention.api import chunked_attention
from llama4_jax.moe import MoE, RouterStats, router_losses
from llama4_jax.text import Transformer, abstract

CHUNK = 8
SIZES = dict(vocab_size=64, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=32, expert_dim=16,
             num_experts=4, chunk=CHUNK, floor_scale=6, init_std=0.3)  # fmt: skip
SCOUT = replace(tiny_scout(), **SIZES, num_layers=4, nope_every=2, rope=replace(tiny_scout().rope, original=CHUNK))
MAVERICK = replace(tiny_maverick(), **SIZES, nope_every=2, num_layers=2)


def make(cfg: ModelConfig):
    return nnx.split(Transformer(cfg, nnx.Rngs(0)))


def random_tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, shape), jnp.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---------------------------------------------------------------------------------------------------- causality


@dataclass(frozen=True)
class OnlyLocal(ModelConfig):
    """The same model without its global layers."""

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        return tuple(replace(kind, local=True) for kind in super().pattern)


def influence(cfg: ModelConfig, T: int) -> np.ndarray:
    """|d logits[t] / d embedding[s]| as [T, S], through a random direction of the vocabulary.

    Every position holds a token of its own, so that a row of the embedding's table is a position's embedding.
    """
    graphdef, state = make(cfg)
    direction_V = normal(1, cfg.vocab_size)
    tokens_1T = jnp.arange(T)[None, :]
    table = state["embedding"]["table_VD"]

    def outputs(table_VD):
        changed = jax.tree.map(lambda x: x, state)  # a copy of the tree: variables of an outer trace are read-only
        changed["embedding"]["table_VD"] = table.replace(table_VD)
        return nnx.merge(graphdef, changed).logits(tokens_1T)[0] @ direction_V

    jacobian_TVD = jax.jit(jax.jacrev(outputs))(table.get_value())
    return np.linalg.norm(np.asarray(jacobian_TVD)[:, :T], axis=-1)


@pytest.mark.parametrize("cfg", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_a_position_depends_on_all_before_it_and_none_behind(cfg):
    T = 3 * CHUNK - 2
    influence_TS = influence(cfg, T)
    causal_TS = np.tril(np.ones((T, T), bool))
    assert np.all(influence_TS[~causal_TS] == 0)
    assert np.all(influence_TS[causal_TS] > 0)


def test_local_layers_alone_see_their_chunk_and_nothing_else():
    T = 3 * CHUNK - 2
    influence_TS = influence(OnlyLocal(**vars(SCOUT)), T)
    chunk_T = np.arange(T) // CHUNK
    visible_TS = np.tril(chunk_T[:, None] == chunk_T[None, :])
    assert np.all(influence_TS[~visible_TS] == 0)
    assert np.all(influence_TS[visible_TS] > 0)


# ------------------------------------------------------------------------------------------------------ packing

# Three documents in two chunk-aligned rows of four chunks, (row, start, length): one of two and a half chunks, one
# that fills the rest of its third chunk but for a token, one that takes the fourth; and one alone after a filler.
DOCUMENTS = [(0, 0, 20), (0, 20, 3), (0, 24, 8), (1, 8, 17)]
ROW = 4 * CHUNK


def packed_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, positions, segment_ids = (np.zeros((2, ROW), np.int32) for _ in range(3))
    tokens[:] = random_tokens(2, 2, ROW)  # fillers hold tokens too: nothing may look at them
    for i, (row, start, length) in enumerate(DOCUMENTS):
        positions[row, start : start + length] = np.arange(length)
        segment_ids[row, start : start + length] = i + 1
    return tokens, positions, segment_ids


@pytest.mark.parametrize("cfg", [SCOUT, replace(MAVERICK, experts_per_token=2)], ids=["scout", "maverick"])
def test_packed_documents_give_the_logits_of_each_alone(cfg):
    graphdef, state = make(cfg)
    tokens, positions, segment_ids = packed_rows()

    @jax.jit
    def run(tokens_BT, positions_BT, segment_ids_BT):
        out = nnx.merge(graphdef, state)(tokens_BT, positions_BT, segment_ids_BT)
        return jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding)

    packed_BTV = run(*map(jnp.asarray, (tokens, positions, segment_ids)))
    for row, start, length in DOCUMENTS:
        alone = np.zeros((3, 2, ROW), np.int32)  # tokens, positions, segment ids: the document at the row's start
        alone[:, 0, :length] = tokens[row, start : start + length], np.arange(length), np.ones(length)
        alone_BTV = run(*map(jnp.asarray, alone))
        got, want = packed_BTV[row, start : start + length], alone_BTV[0, :length]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_rows_of_eight_chunks_as_they_are_packed_give_the_logits_of_each_document_alone():
    """Documents of 2 tokens to a whole row and more, in the rows that `data.packing` makes of them."""
    graphdef, state = make(SCOUT)
    rng, T = np.random.default_rng(3), 8 * CHUNK
    lengths = [T + 5, 5 * CHUNK + 1, 3 * CHUNK, 2 * CHUNK + 3, CHUNK, CHUNK - 1, 7, 5, 3, 3, 2, 2]
    documents = {(0, n): Document(rng.integers(0, SCOUT.vocab_size, length, np.int32), 0, n, True)
                 for n, length in enumerate(lengths)}  # fmt: skip
    rows = pack([span for key, d in documents.items() for span in cut(key, d, T)], T, CHUNK)
    batch = build_batch([(row, documents) for row in rows], T, 0)
    assert max(batch.segment_ids.max(axis=1)) > 3 and len(rows) > 2

    @jax.jit
    def run(tokens_BT, positions_BT, segment_ids_BT):
        out = nnx.merge(graphdef, state)(tokens_BT, positions_BT, segment_ids_BT)
        return jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding)

    packed_BTV = run(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)))
    pieces = [(row, piece) for row, of in enumerate(rows) for piece in of]
    alone = np.zeros((3, len(pieces), T), np.int32)
    for n, (_, piece) in enumerate(pieces):
        length = piece.stop - piece.start
        tokens = documents[piece.key].tokens[piece.start : piece.stop]
        alone[:, n, :length] = tokens, np.arange(length), np.ones(length)
    alone_BTV = run(*map(jnp.asarray, alone))
    for n, (row, piece) in enumerate(pieces):
        length = piece.stop - piece.start
        got, want = packed_BTV[row, piece.at : piece.at + length], alone_BTV[n, :length]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), piece


def test_chunks_of_the_row_are_chunks_of_the_documents():
    """For chunk-aligned rows, cutting the row equals the mask by (segment, position // chunk), all else equal."""
    _, positions, segment_ids = packed_rows()
    q, k, v = normal(3, 2, ROW, 4, 8), normal(4, 2, ROW, 2, 8), normal(5, 2, ROW, 2, 8)
    cut = chunked_attention(q, k, v, jnp.asarray(segment_ids), CHUNK, backend="reference")
    pieces = jnp.asarray(segment_ids * ROW + positions // CHUNK)  # one id for each (segment, chunk of the document)
    masked = reference.attention(q, k, v, pieces, pieces)
    valid = segment_ids > 0
    np.testing.assert_allclose(np.asarray(cut)[valid], np.asarray(masked)[valid], atol=1e-6)
    document = reference.attention(q, k, v, jnp.asarray(segment_ids), jnp.asarray(segment_ids))
    assert np.abs(np.asarray(document - masked))[valid].max() > 0.1  # the chunks do hide something


# ---------------------------------------------------------------------------------------------------- execution


def loss_and_gradients(cfg: ModelConfig, execution: Execution):
    graphdef, state = make(cfg)
    tokens_BT = random_tokens(6, 2, 20)
    weights_BTV = normal(7, 2, 20, 64)

    @jax.jit
    @jax.value_and_grad
    def loss(state):
        model = nnx.merge(graphdef, state)
        out = model(tokens_BT, jnp.arange(20)[None, :].repeat(2, 0), jnp.ones_like(tokens_BT), execution)
        balance, z, _ = router_losses(out.router, cfg.experts_per_token)
        logits_BTV = jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding).astype(jnp.float32)
        return jnp.mean(jax.nn.log_softmax(logits_BTV) * weights_BTV) + 0.1 * balance + 0.1 * z

    value, gradients = loss(state)
    return float(value), jax.tree.leaves(gradients)


def test_what_the_backward_pass_recomputes_changes_no_gradient():
    value, gradients = loss_and_gradients(SCOUT, Execution(remat="none"))
    assert all(np.abs(g).max() > 0 for g in gradients)
    for remat in ("layer", "block"):
        other_value, others = loss_and_gradients(SCOUT, Execution(remat=remat))
        assert other_value == pytest.approx(value, rel=1e-6)
        assert max(relative(o, g) for o, g in zip(others, gradients, strict=True)) < 1e-5


def test_bfloat16_is_close_to_fp32():
    # One expert, so that rounding sends no token elsewhere; weights that keep the softmax from amplifying it.
    graphdef, state = make(replace(MAVERICK, num_experts=1, init_std=0.1))
    tokens_BT = random_tokens(8, 2, 20)

    @jax.jit(static_argnames="dtype")
    def logits(dtype):
        return nnx.merge(graphdef, state).logits(tokens_BT, Execution(compute_dtype=dtype))

    full, half = logits("float32"), logits("bfloat16")
    assert half.dtype == jnp.float32
    assert 1e-4 < relative(half, full) < 2e-2


# ------------------------------------------------------------------------------------------- mixture of experts


def expected_moe(moe: MoE, x_RD: np.ndarray, top: int, scale: str) -> np.ndarray:
    """The mixture in float64, a token and an expert at a time, its gate on the expert's input or output."""

    def swiglu(x, gate, up, down):
        z = x @ gate
        return (z / (1 + np.exp(-z)) * (x @ up)) @ down

    def of(ffn):
        return [np.asarray(w[...], np.float64) for w in ffn]

    router_DE = np.asarray(moe.router_DE[...], np.float64)
    bias_E = np.asarray(moe.bias_E[...], np.float64) if moe.cfg.router_bias else 0
    shared = of((moe.shared.wi_gate_DF, moe.shared.wi_up_DF, moe.shared.wo_FD))
    experts = of((moe.experts.wi_gate_EDF, moe.experts.wi_up_EDF, moe.experts.wo_EFD))
    out = []
    for x in x_RD.astype(np.float64):
        z_E = x @ router_DE
        y = swiglu(x, *shared)
        for e in np.argsort(-(z_E + bias_E))[:top]:
            g = 1 / (1 + np.exp(-z_E[e]))
            weights = [w[e] for w in experts]
            y = y + (swiglu(g * x, *weights) if scale == "input" else g * swiglu(x, *weights))
        out.append(y)
    return np.stack(out)


@pytest.mark.parametrize("top", [1, 2])
def test_the_gate_scales_the_experts_input(top):
    moe = MoE(replace(SCOUT, experts_per_token=top), nnx.Rngs(1))
    x_BTD = normal(9, 2, 30, 32)
    y_BTD, _ = moe(x_BTD, jnp.ones((2, 30)), Execution())
    x_RD = np.asarray(x_BTD).reshape(60, 32)
    want = expected_moe(moe, x_RD, top, "input").reshape(2, 30, 32)
    assert np.abs(y_BTD - want).max() < 1e-5 * np.abs(want).max()
    assert relative(y_BTD, expected_moe(moe, x_RD, top, "output").reshape(2, 30, 32)) > 0.05


def biased(moe: MoE, bias_E: jax.Array) -> MoE:
    """The same layer with a router's bias."""
    cfg = replace(moe.cfg, router_bias=True)
    graphdef, state = nnx.split(MoE(cfg, nnx.Rngs(1)))
    layer = nnx.merge(graphdef, nnx.merge_state(state, nnx.split(moe)[1]))
    layer.bias_E.set_value(bias_E)
    return layer


@pytest.mark.parametrize("top", [1, 2])
def test_a_bias_chooses_and_gates_and_statistics_are_of_the_raw_logit(top):
    plain = MoE(replace(SCOUT, experts_per_token=top), nnx.Rngs(1))
    moe = biased(plain, jnp.asarray([1.0, -1.0, 0.5, 0.0]))
    x_BTD, ones_BT = normal(9, 2, 30, 32), jnp.ones((2, 30))
    y_BTD, stats = moe(x_BTD, ones_BT, Execution())
    x_RD = np.asarray(x_BTD).reshape(60, 32)
    want = expected_moe(moe, x_RD, top, "input").reshape(2, 30, 32)
    assert np.abs(y_BTD - want).max() < 1e-5 * np.abs(want).max()

    z_RE = x_RD.astype(np.float64) @ np.asarray(moe.router_DE[...], np.float64)
    chosen_RA = np.argsort(-(z_RE + np.asarray(moe.bias_E[...])), axis=1)[:, :top]
    np.testing.assert_array_equal(stats.load, np.bincount(chosen_RA.reshape(-1), minlength=4))
    _, raw = plain(x_BTD, ones_BT, Execution())
    assert np.abs(stats.load - raw.load).sum() >= 10  # other experts are chosen ...
    for a, b in ((stats.probability, raw.probability), (stats.z, raw.z)):  # ... for the same reasons
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("top", [1, 2])
def test_no_gradient_reaches_the_bias_and_at_zero_the_others_are_those_without_it(top):
    plain = MoE(replace(SCOUT, experts_per_token=top), nnx.Rngs(1))
    x_BTD, ones_BT = normal(9, 2, 30, 32), jnp.ones((2, 30))

    def gradients(moe: MoE) -> dict:
        graphdef, state = nnx.split(moe)

        def loss(state):
            y_BTD, stats = nnx.merge(graphdef, state)(x_BTD, ones_BT, Execution())
            balance, z, _ = router_losses(stats, top)
            return jnp.sin(y_BTD).sum() + balance + z

        return {path: g.get_value() for path, g in nnx.to_flat_state(jax.grad(loss)(state))}

    want, at_zero = gradients(plain), gradients(biased(plain, jnp.zeros(4)))
    elsewhere = gradients(biased(plain, jnp.asarray([1.0, -1.0, 0.5, 0.0])))
    assert not at_zero.pop(("bias_E",)).any() and not elsewhere.pop(("bias_E",)).any()
    assert at_zero.keys() == want.keys()
    for path, g in want.items():
        np.testing.assert_allclose(at_zero[path], g, atol=1e-6 * np.abs(g).max(), err_msg=str(path))
    assert relative(elsewhere[("router_DE",)], want[("router_DE",)]) > 0.05


def test_a_model_without_a_bias_has_no_trace_of_it():
    """With it there is a row of zeros more for each MoE layer, and every other weight of a seed is the same."""
    with_bias = dict(nnx.to_flat_state(nnx.split(Transformer(replace(SCOUT, router_bias=True), nnx.Rngs(3)))[1]))
    without = dict(nnx.to_flat_state(nnx.split(Transformer(SCOUT, nnx.Rngs(3)))[1]))
    more = {path: with_bias.pop(path) for path in with_bias.keys() - without.keys()}
    assert {path[3:] for path in more} == {("ffn", "bias_E")} and len(more) == SCOUT.period
    for p in more.values():
        assert p.axes == (None,) and p.fp32 and not np.signbit(p.get_value()).any() and not p.get_value().any()
    assert sum(p.get_value().size for p in more.values()) == SCOUT.num_moe_layers * SCOUT.num_experts
    for path, p in without.items():
        np.testing.assert_array_equal(p.get_value(), with_bias[path].get_value())


@pytest.mark.parametrize("top", [1, 2])
def test_padding_does_not_enter_the_routers_statistics(top):
    moe = MoE(replace(SCOUT, experts_per_token=top), nnx.Rngs(1))
    x_BTD = normal(10, 2, 12, 32)
    valid_BT = jnp.asarray(np.arange(12)[None, :] < np.array([[12], [5]]), jnp.float32)
    _, stats = moe(x_BTD, valid_BT, Execution())
    _, other = moe(jnp.where(valid_BT[:, :, None] > 0, x_BTD, 100.0), valid_BT, Execution())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, other)
    assert float(stats.tokens) == 17
    assert float(stats.load.sum()) == 17 * top
    assert float(stats.probability.sum()) == pytest.approx(17, rel=1e-5)


def test_the_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    """Two layers: f = P = 1/E, and everything on one expert; the loss is the mean of 1 and E."""
    E, tokens = 4, 100.0
    one_hot = jnp.array([tokens, 0, 0, 0])
    even = jnp.full(E, tokens / E)
    stats = RouterStats(jnp.stack([2 * even, 2 * one_hot]), jnp.stack([even, one_hot]),
                        jnp.array([tokens, 9 * tokens]), jnp.full(2, tokens), jnp.zeros(2))  # fmt: skip
    balance, z, total = router_losses(RouterStats(*(s[:1] for s in stats)), experts_per_token=2)
    assert (float(balance), float(z)) == (pytest.approx(1), pytest.approx(1))
    balance, z, total = router_losses(stats, experts_per_token=2)
    assert (float(balance), float(z)) == (pytest.approx((1 + E) / 2), pytest.approx(5))
    assert float(total.load.sum()) == 4 * tokens


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [(scout, 107_769_861_120), (maverick, 400_711_848_960), (behemoth, 2_014_543_888_384)],
)
def test_presets_have_their_parameter_counts(preset, parameters):
    leaves = jax.tree.leaves(nnx.state(abstract(preset()), nnx.Param), is_leaf=is_variable)
    assert sum(math.prod(p.get_value().shape) for p in leaves) == parameters


@pytest.mark.parametrize("cfg", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_shapes_without_draws_are_those_of_the_drawn(cfg):
    """`abstract` traces no initialiser, and leaves those that come after it alone."""
    graphdef, shapes = nnx.split(abstract(cfg))
    drawn_graphdef, drawn = make(cfg)
    assert graphdef == drawn_graphdef and jax.tree.structure(shapes) == jax.tree.structure(drawn)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [(x.shape, x.dtype) for x in jax.tree.leaves(drawn)]
    weights = [x for x in jax.tree.leaves(drawn) if x.ndim > 2]
    assert all(float(jnp.std(x)) > 0 for x in weights)


def test_patterns_are_the_familys():
    """Scout: all MoE, layers 3, 7, ... global. Maverick: MoE at odd layers."""
    assert [kind.local for kind in scout().pattern] == [True, True, True, False]
    assert all(kind.moe for kind in scout().pattern) and scout().num_moe_layers == 48
    assert [kind.moe for kind in maverick().pattern] == [False, True, False, True]
    assert [kind.local for kind in maverick().pattern] == [True, True, True, False]
    assert maverick().num_moe_layers == 24
    assert all(preset().num_blocks >= 1 for preset in MODELS.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_layers=6), r"num_layers \(6\) must be a multiple .* = 4: the nearest is 8"),
        (dict(num_layers=1), "the nearest is 4"),
        (dict(num_heads=5), r"num_heads \(5\) must be a multiple of num_kv_heads \(2\)"),
        (dict(head_dim=7), "head_dim must be even for RoPE, not 7"),
        (dict(experts_per_token=5), r"experts_per_token \(5\) exceeds num_experts \(4\)"),
        (dict(chunk=0), "chunk must be at least 1, not 0"),
        (dict(embed_dim=-3), "embed_dim must be at least 1, not -3"),
    ],
)
def test_impossible_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_scout(), **change)


def test_an_impossible_rope_is_named():
    with pytest.raises(ValueError, match="factor >= 1"):
        Rope(factor=0.5)
    with pytest.raises(ValueError, match="low <= high"):
        Rope(low=4.0, high=1.0)


@pytest.mark.parametrize(
    ("cfg", "remat", "offload"),
    [
        (SCOUT, "attention", False),
        (SCOUT, "layer", True),
        (SCOUT, "block", True),
        (SCOUT, "nested", False),  # one loop over both kinds of attention
        (replace(MAVERICK, num_layers=4, nope_every=4), "nested", False),  # neighbours differ: a loop of one layer each
    ],
)
def test_what_is_recomputed_changes_nothing(cfg, remat, offload):
    graph, state = make(cfg)
    tokens, positions = jnp.arange(24)[None] % 64, jnp.arange(24)[None]
    weights = jax.random.normal(jax.random.key(1), (1, 24, cfg.embed_dim))

    def value_and_gradient(**how):
        def loss(state):
            out = nnx.merge(graph, state)(tokens, positions, jnp.ones_like(tokens), Execution(**how))
            return jnp.sum(out.hidden * weights), out.router

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)

    got, want = value_and_gradient(remat=remat, offload=offload), value_and_gradient(remat="none")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_saved_attention_is_not_computed_again():
    """Under `block` all is computed twice, under `attention` all but attention, whose softmax has exponentials."""
    graph, state = make(SCOUT)
    tokens, positions = jnp.arange(24)[None] % 64, jnp.arange(24)[None]

    def exponentials(remat: str) -> int:
        def loss(state):
            run = Execution(remat=remat)
            return nnx.merge(graph, state)(tokens, positions, jnp.ones_like(tokens), run).hidden.sum()

        return jax.jit(jax.grad(loss)).lower(state).as_text().count("stablehlo.exponential")

    assert exponentials("none") < exponentials("attention") < exponentials("block")
