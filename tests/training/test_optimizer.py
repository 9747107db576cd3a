"""The schedule's corners, what is a matrix and what decays, and each rule against one written by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama4_jax.axes import Execution, is_variable
from llama4_jax.config import scout, tiny_maverick, tiny_scout
from llama4_jax.text import Transformer, abstract
from training.checkpoint import Checkpoints, named_leaves
from training.config import MeshConfig, OptimizerConfig
from training.mesh import make_mesh, shardings
from training.optimizer import decays, is_hidden_matrix, learning_rate, make_optimizer, matrix_dims
from training.record import run_record
from training.state import abstract_state

KINDS = {
    "adamw": OptimizerConfig(),
    "adamw_bf16": OptimizerConfig(moment_dtype="bfloat16"),
    "adafactor": OptimizerConfig(kind="adafactor"),
    "muon": OptimizerConfig(kind="muon", b1=0.95),
    "muon_bf16": OptimizerConfig(kind="muon", b1=0.95, moment_dtype="bfloat16"),
}
AXES = {
    "scale_D": ("embed",),
    "router_DE": ("embed", None),
    "wq_DNH": ("embed", "heads", None),
    "wo_NHD": ("heads", None, "embed"),
    "wi_EDF": ("experts", "embed", "ffn"),
    "wo_EFD": ("experts", "ffn", "embed"),
    "kernel_DV": ("embed", "vocab"),
}
SIZES = dict(embed=16, experts=2, heads=4, ffn=24, vocab=32)  # and 2 for a dimension without a name
BLOCKS = 3
STACKED = [name for name in AXES if name != "kernel_DV"]
BARE = dict(learning_rate=1.0, warmup=0, decay=0.0, weight_decay=0.0, clip=1e9)  # the update is minus the direction


def weights(seed: int) -> nnx.State:
    """A weight of every sort, those of layers stacked over three blocks, with normal values."""
    rng, out = np.random.default_rng(seed), {}
    for name, axes in AXES.items():
        shape = (BLOCKS,) * (name in STACKED) + tuple(SIZES.get(a or "", 2) for a in axes)
        value = jnp.asarray(rng.normal(size=shape), jnp.float32)
        out[name] = nnx.Param(value, axes=axes, fp32=name.startswith("router"))
    return nnx.State(out)


def directions(cfg: OptimizerConfig, steps: int = 2) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Gradients of some steps, and the directions they gave, by name."""
    optimizer = make_optimizer(replace(cfg, **BARE), steps)
    params = weights(0)
    update, state, grads, out = jax.jit(optimizer.update), optimizer.init(params), [], []
    for step in range(steps):
        g = weights(step + 1)
        updates, state = update(g, state, params)
        grads.append({name: np.asarray(p.get_value(), np.float64) for name, p in g.items()})
        out.append({name: -np.asarray(p.get_value(), np.float64) for name, p in updates.items()})
    return grads, out


def matrices(name: str, x: np.ndarray) -> np.ndarray:
    """The matrices of a weight, [n, rows, columns], by its name."""
    D = SIZES["embed"]
    shape = dict(wq_DNH=(D, -1), wo_NHD=(8, D), wi_EDF=(D, 24), wo_EFD=(24, D), router_DE=(D, 2), kernel_DV=(D, 32))
    rows, cols = shape[name]
    return x.reshape(-1, rows, 8 if cols == -1 else cols)


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


def test_adafactor_is_the_papers_by_hand_for_each_block_and_expert():
    """Algorithm 4 of 1804.04235 on one matrix at a time, without its relative step size; scales keep all of v."""
    grads, got = directions(replace(KINDS["adafactor"], b2=0.5))  # so that the second step is past the cap
    for name in AXES:
        moments: dict[int, tuple] = {}
        for step, (g, u) in enumerate(zip(grads, got, strict=True), start=1):
            b2 = min(1 - step**-0.8, 0.5)
            whole = g[name] if name == "scale_D" else matrices(name, g[name])
            for i, one in enumerate(whole):
                s = one**2 + 1e-16
                new = (s,) if name == "scale_D" else (s.mean(1), s.mean(0))
                old = moments.get(i, tuple(map(np.zeros_like, new)))
                moments[i] = tuple(b2 * a + (1 - b2) * b for a, b in zip(old, new, strict=True))
                v = moments[i][0] if name == "scale_D" else np.outer(*moments[i]) / moments[i][0].mean()
                want = one / np.sqrt(v)
                want /= max(1, np.sqrt((want**2).mean()))
                np.testing.assert_allclose(u[name].reshape(whole.shape)[i], want, rtol=1e-5, atol=1e-5)


def test_adafactor_keeps_rows_and_columns_where_optax_keeps_layers():
    wide = nnx.State({"w": nnx.Param(jnp.zeros((64, 2, 8, 4)), axes=("experts", "embed", "ffn"), fp32=False)})
    theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=1).init(wide)
    assert jax.tree.leaves(theirs.v_row)[0].shape == (2, 8, 4)  # the 64 layers are averaged over
    ours = make_optimizer(KINDS["adafactor"], 1).init(wide)[1].v["w"]
    assert [(x.get_value().shape, x.axes) for x in ours] == [((64, 2, 8), ("experts", "embed")),
                                                             ((64, 2, 4), ("experts", "ffn"))]  # fmt: skip
    plain = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    theirs = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    want, _ = theirs.update(plain, theirs.init(plain), plain)
    one = nnx.State({"w": nnx.Param(plain, axes=("embed", "ffn"), fp32=False)})
    optimizer = make_optimizer(replace(KINDS["adafactor"], eps=1e-15, **BARE), 1)
    got, _ = optimizer.update(one, optimizer.init(one), one)
    np.testing.assert_allclose(-jax.tree.leaves(got)[0], want, rtol=1e-5)  # of a lone matrix the two are one


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """What the iteration makes of a matrix: of singular values the polynomial's fifth iterate, of vectors nothing."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def test_muon_is_by_hand_for_each_block_and_expert():
    cfg = KINDS["muon"]
    (first, second), got = directions(cfg)
    for name in ("wq_DNH", "wo_NHD", "wi_EDF", "wo_EFD"):
        nesterov = (first[name] * (1 + cfg.b1), second[name] * (1 + cfg.b1) + cfg.b1**2 * first[name])
        for momentum, u in zip(nesterov, got, strict=True):
            whole = matrices(name, momentum)
            assert len(whole) == (BLOCKS * 2 if "E" in name else BLOCKS)
            want = 0.2 * np.sqrt(max(whole.shape[1:])) * np.stack([newton_schulz(x) for x in whole])
            np.testing.assert_allclose(matrices(name, u[name]), want, rtol=1e-5, atol=1e-5)


def test_muon_leaves_embeddings_router_and_scales_to_adam():
    cfg = KINDS["muon"]
    (_, muon), (_, adam) = directions(cfg), directions(replace(cfg, kind="adamw"))
    for name in ("scale_D", "router_DE", "kernel_DV"):
        for a, b in zip(muon, adam, strict=True):
            np.testing.assert_array_equal(a[name], b[name])
    chosen = {path for path, p in named_leaves(nnx.split(abstract(tiny_maverick()))[1]).items() if is_hidden_matrix(p)}
    names = {path.rsplit(".", 1)[-1] for path in chosen}
    assert names == {"wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "wi_gate_DF", "wi_up_DF", "wo_FD", "wi_gate_EDF",
                     "wi_up_EDF", "wo_EFD"}  # fmt: skip


def test_optax_takes_stacked_scales_for_matrices():
    """The trap: a rank of two is a norm's scale of stacked layers, and a layer's matrix has a rank of three or four."""
    grads = weights(1)
    theirs = optax.contrib.muon(1.0, adam_learning_rate=1.0, consistent_rms=0.2)
    updates, _ = theirs.update(grads, theirs.init(weights(0)), weights(0))
    (_, (ours, *_)) = directions(KINDS["muon"])

    def orthogonal(updates) -> set[str]:
        """Weights whose matrices have singular values near 1, but for the scale of the update."""
        found = set()
        for name in AXES:
            whole = np.asarray(updates[name])
            whole = whole if name == "scale_D" else matrices(name, whole)
            s = np.linalg.svd(whole, compute_uv=False) / (0.2 * np.sqrt(max(whole.shape[-2:])))
            if s.min() > 0.5 and s.max() < 1.3:
                found.add(name)
        return found

    theirs = {name: p.get_value() for name, p in updates.items()}
    assert "scale_D" in orthogonal(theirs) and not orthogonal(theirs) & {"wq_DNH", "wo_NHD", "wi_EDF", "wo_EFD"}
    assert orthogonal(ours) == {"wq_DNH", "wo_NHD", "wi_EDF", "wo_EFD"}


def test_a_weight_whose_sides_are_unknown_is_refused():
    with pytest.raises(
        ValueError, match=r"axes \('heads', 'embed', None\) is no matrix: .* embed must be first or last"
    ):
        matrix_dims(nnx.Param(jnp.zeros((2, 2, 2)), axes=("heads", "embed", None), fp32=False))
    with pytest.raises(ValueError, match="adafactor keeps no first moment"):
        OptimizerConfig(kind="adafactor", moment_dtype="bfloat16")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_only_rounds(kind):
    (_, exact), (_, rounded) = directions(KINDS[kind], 3), directions(KINDS[f"{kind}_bf16"], 3)
    errors = [np.abs(a[n] - b[n]).max() / np.abs(a[n]).max() for a, b in zip(exact, rounded, strict=True) for n in AXES]
    assert 1e-5 < max(errors) < 0.02
    state = make_optimizer(KINDS[f"{kind}_bf16"], 1).init(weights(0))
    kept = {
        (path.split(".")[-2], x.get_value().dtype.name) for path, x in named_leaves(state).items() if is_variable(x)
    }
    assert kept == {("mu", "bfloat16"), ("nu", "float32")} | ({("trace", "bfloat16")} if kind == "muon" else set())


def test_bytes_of_state_for_scout():
    params = nnx.split(abstract(scout()))[1]
    count = sum(x.size for x in jax.tree.leaves(params))
    hidden = sum(p.get_value().size for p in named_leaves(params).values() if is_hidden_matrix(p))
    size = {
        kind: sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make_optimizer(cfg, 1).init, params))
        )
        for kind, cfg in KINDS.items()
    }
    steps = 4  # an int32 of the schedule; each rule but muon for its own part has another
    assert size["adamw"] == 8 * count + 2 * steps
    assert size["adamw_bf16"] == 6 * count + 2 * steps
    assert size["muon"] == 4 * hidden + 8 * (count - hidden) + 2 * steps
    assert size["muon_bf16"] == 2 * hidden + 6 * (count - hidden) + 2 * steps
    assert size["adafactor"] < 2e-3 * count


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(expert=2, fsdp=2, tensor=2), dict(replica=2, context=4)], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_a_mesh_gives_the_update_of_one_device(kind, sizes):
    params = weights(0)

    def run(mesh):
        optimizer = make_optimizer(replace(KINDS[kind], **BARE | dict(weight_decay=0.1, clip=1.0)), 2, mesh)

        def steps(params):
            state = optimizer.init(params)
            for seed in (1, 2):
                updates, state = optimizer.update(weights(seed), state, params)
            return updates, state

        placed = jax.eval_shape(steps, params)
        out = None if mesh is None else shardings(mesh, Execution().specs(placed))
        return jax.jit(steps, out_shardings=out)(
            params if mesh is None else jax.device_put(params, shardings(mesh, Execution().specs(params)))
        )

    got, want = run(make_mesh(MeshConfig(**dict(fsdp=1) | sizes))), run(None)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_moments_lie_where_their_weights_do():
    specs = {
        kind: {k: s.get_value() if is_variable(s) else s for k, s in named_leaves(Execution().specs(state)).items()}
        for kind in ("adafactor", "muon")
        for state in [make_optimizer(KINDS[kind], 1).init(weights(0))]
    }
    assert specs["adafactor"]["1.v.wi_EDF.row"] == P(None, ("expert",), ("fsdp", "context"))
    assert specs["adafactor"]["1.v.wi_EDF.col"] == P(None, ("expert",), ("tensor",))
    assert specs["adafactor"]["1.v.wq_DNH.col"] == P(None, ("tensor",), None)
    assert specs["muon"]["1.chosen.0.trace.wi_EDF"] == P(None, ("expert",), ("fsdp", "context"), ("tensor",))
    assert specs["muon"]["1.others.nu.scale_D"] == P(None, ("fsdp", "expert", "context"))
    assert "1.others.nu.wi_EDF" not in specs["muon"]


@pytest.mark.parametrize("kind", ["adafactor", "muon_bf16"])
def test_checkpoints_keep_the_state(kind, make_run):
    cfg = make_run()
    cfg = replace(cfg, learners={"scout": replace(cfg.learners["scout"], optimizer=KINDS[kind])})
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(np.asarray(rng.normal(size=x.shape), x.dtype), x.sharding),
        abstract_state(cfg, make_mesh(MeshConfig(fsdp=8))),
    )
    with Checkpoints(cfg.folder, keep=1) as checkpoints:
        checkpoints.save(3, state, {}, run_record(cfg, "0" * 64))
    like = abstract_state(cfg, make_mesh(MeshConfig(expert=2, fsdp=4)))
    with Checkpoints(cfg.folder) as checkpoints:
        again, _ = checkpoints.restore(3, like)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b, c in zip(*map(jax.tree.leaves, (again, state, like)), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
        assert a.sharding == c.sharding


@pytest.fixture(scope="module")
def tiny_model():
    """Weights of a tiny model, and the (loss, gradient) of predicting a cycle of 32 tokens."""
    V, T = 32, 16
    model = replace(tiny_scout(), vocab_size=V, embed_dim=16, num_layers=2, nope_every=2, num_heads=2, num_kv_heads=1,
                    head_dim=8, expert_dim=16, num_experts=2, chunk=16, floor_scale=8)  # fmt: skip
    tokens = jnp.asarray((np.arange(T + 1) + np.arange(0, V, 4)[:, None]) % V, jnp.int32)
    graphdef = nnx.split(abstract(model))[0]

    def loss(params):
        logits = nnx.merge(graphdef, params).logits(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    params = jax.jit(lambda: nnx.split(Transformer(model, nnx.Rngs(0)))[1])()
    return params, jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_its_state_is_donated(kind, tiny_model):
    params, loss_and_grad = tiny_model
    rate = {"muon": 0.03, "adafactor": 0.01, "adamw": 0.02}[KINDS[kind].kind]
    optimizer = make_optimizer(replace(KINDS[kind], learning_rate=rate, warmup=3), 30)
    state, losses = jax.jit(optimizer.init)(params), []

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    for _ in range(30):
        value, grads = loss_and_grad(params)
        losses.append(float(value))
        before = jax.tree.leaves((params, state))
        params, state = step(params, state, grads)
        assert all(x.is_deleted() for x in before)
    assert abs(losses[0] - np.log(32)) < 0.2 and losses[-1] < 1.0, losses
