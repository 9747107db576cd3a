"""The router's bias: it follows the load of the global batch, evens it, and is exactly zero at the end."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from data.batch import Batch
from llama4_jax.axes import Execution, map_params
from llama4_jax.config import ModelConfig, tiny_maverick, tiny_scout
from training.checkpoint import Checkpoints
from training.config import Distillation, Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.mesh import BATCH_SPEC, make_mesh
from training.optimizer import make_optimizer
from training.router_bias import follow_load
from training.state import LearnerState, TrainState, abstract_state, graphdef, init_state
from training.step import gradient, make_train_step

B, T, V = 8, 32, 64
SIZES = dict(vocab_size=V, chunk=16, embed_dim=32, head_dim=8, num_heads=2, num_kv_heads=2, expert_dim=16, dense_dim=32,
             num_experts=4, floor_scale=8, nope_every=2, router_bias=True)  # fmt: skip
SCOUT = replace(tiny_scout(), **SIZES, num_layers=4)  # two blocks of two MoE layers
MAVERICK = replace(tiny_maverick(), **SIZES, num_layers=4)  # two blocks of a dense and a MoE layer
SMALL = replace(MAVERICK, num_layers=2)
U = 0.01


def learner(model: ModelConfig = SCOUT, **changes) -> Learner:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=0, decay=0.5)
    base = Learner(model, optimizer, compute_dtype="float32", remat="none", router_balance=0.0, router_bias_speed=U)
    return replace(base, **changes)


def run_config(steps: int, **learners: Learner) -> RunConfig:
    return RunConfig("test", learners, train=TrainConfig(steps=steps, batch=B, seq_len=T))


def on(devices: int = 1, **sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def batches(n: int) -> list[Batch]:
    """Skewed random tokens; the second half of every other row is padding."""
    rng = np.random.default_rng(0)
    ones, zeros = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    segments = ones.copy()
    segments[::2, T // 2 :] = 0
    positions = np.arange(T, dtype=np.int32)[None].repeat(B, 0)
    out = []
    for _ in range(n):
        tokens = (rng.zipf(1.3, (B, T + 1)) % V).astype(np.int32)
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, segments.astype(np.float32), zeros,
                         ones > 0, zeros))  # fmt: skip
    return out


def biases(params: nnx.State) -> dict[int, np.ndarray]:
    """Of each layer of the pattern that has one: [blocks, E]."""
    flat = nnx.to_flat_state(params)
    return {path[2]: np.asarray(p.get_value()) for path, p in flat if path[-1] == "bias_E"}  # pyright: ignore


def with_biases(params: nnx.State, value) -> nnx.State:
    """The weights with `value(shape)` in place of every bias."""
    return nnx.from_flat_state([
        (path, p.replace(jnp.asarray(value(p.get_value().shape), jnp.float32)) if path[-1] == "bias_E" else p)
        for path, p in nnx.to_flat_state(params)
    ])  # fmt: skip


def fresh(cfg: RunConfig) -> TrainState:
    """Random weights, and zeros in the optimizers and the biases: NumPy's, as compiling an init takes its time."""
    rng = np.random.default_rng(1)

    def weight(p: nnx.Param) -> nnx.Variable:
        shape = p.get_value().shape
        value = rng.normal(scale=0.1, size=shape) if len(p.axes) > 1 else np.full(shape, p.axes != (None,))
        return p.replace(value.astype(np.float32))

    state = jax.eval_shape(partial(init_state, cfg))
    learners = {
        name: LearnerState(
            map_params(weight, s.params),
            *(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), of) for of in (s.optimizer, s.weighting)),
        )
        for name, s in state.learners.items()
    }
    return TrainState(np.int32(0), learners)


def initial(model: ModelConfig, value=np.zeros) -> LearnerState:
    state = fresh(run_config(4, it=learner(model))).learners["it"]
    return state._replace(params=with_biases(state.params, value))


@cache
def compiled(steps: int, learners: tuple[tuple[str, Learner], ...], mesh: Mesh):
    return make_train_step(run_config(steps, **dict(learners)), mesh, 1)


def run(cfg: RunConfig, mesh: Mesh, until: int, start: TrainState) -> tuple[TrainState, list[dict]]:
    """The state after step `until` and the metrics of each step since `start`, on the host."""
    step = compiled(cfg.train.steps, tuple(cfg.learners.items()), mesh)
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    state, metrics = jax.device_put(jax.device_get(start), placed), []
    for batch in batches(until)[int(start.step) :]:
        state, one = step(state, jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)))
        metrics.append(jax.device_get(one))
    return jax.device_get(state), metrics


# --- One update


def test_a_bias_moves_by_u_against_its_load_in_its_own_layer():
    """Rows of loads are MoE layers in the model's order; weights lie by layer of the pattern, then by block."""
    load_LE = jnp.asarray([[8, 0, 4, 4], [0, 16, 0, 0], [5, 5, 5, 5], [1, 2, 3, 10]], jnp.float32)
    want_LE = U * np.array([[-1, 1, 0, 0], [1, -1, 1, 1], [0, 0, 0, 0], [1, 1, 1, -1]], np.float32)
    before = initial(SCOUT, lambda shape: np.full(shape, 0.25))
    got = biases(follow_load(learner(), before, load_LE, jnp.int32(1), 4).params)
    for i in (0, 1):  # layer l is layer l % 2 of block l // 2
        np.testing.assert_allclose(got[i], 0.25 + want_LE[i::2], rtol=1e-6)

    got = biases(follow_load(learner(MAVERICK), initial(MAVERICK), load_LE[:2], jnp.int32(0), 4).params)
    assert got.keys() == {1}
    np.testing.assert_array_equal(got[1], want_LE[:2])


def test_nothing_else_moves_and_a_frozen_or_unbiased_learner_not_at_all():
    before, load_LE = initial(MAVERICK), jnp.asarray([[8, 0, 4, 4], [0, 16, 0, 0]], jnp.float32)
    after = follow_load(learner(MAVERICK), before, load_LE, jnp.int32(0), 4)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(s.params) for s in (before, after)), strict=True):
        assert (path[-1] == "bias_E") != np.array_equal(a.get_value(), b.get_value())
    for other in (learner(MAVERICK, optimizer=None), learner(replace(MAVERICK, router_bias=False))):
        assert follow_load(other, before, load_LE, jnp.int32(0), 4) is before


def test_the_bias_falls_linearly_to_exactly_zero_and_stays():
    state, steps = initial(MAVERICK, lambda shape: np.linspace(-3, 7, 8).reshape(shape)), 20
    first, load_LE = biases(state.params)[1], jnp.asarray([[8, 0, 4, 4]] * 2, jnp.float32)
    follow = jax.jit(lambda state, step: follow_load(learner(MAVERICK), state, load_LE, step, steps))
    for done in range(1, 11):  # decay is half of the steps
        state = follow(state, jnp.int32(9 + done))
        np.testing.assert_allclose(biases(state.params)[1], first * (10 - done) / 10, rtol=1e-6)
    for beyond in range(3):
        assert not biases(state.params)[1].any()
        state = follow(state, jnp.int32(steps + beyond))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_no_optimizer_moves_or_counts_the_bias(kind):
    """Neither decay nor clipping nor a running mean: its own update is 0, the others' are those of a model without."""
    params = initial(SMALL, np.ones).params["blocks"]["layers"][1]["ffn"]
    rng = np.random.default_rng(3)
    grads = with_biases(jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params), np.zeros)
    optimizer = make_optimizer(OptimizerConfig(kind=kind, warmup=0, clip=0.1), 4)

    def without(tree: nnx.State) -> nnx.State:
        return nnx.from_flat_state([(path, p) for path, p in nnx.to_flat_state(tree) if path[-1] != "bias_E"])

    def updates(grads: nnx.State, params: nnx.State) -> dict:
        state = optimizer.init(params)
        for _ in range(2):
            out, state = optimizer.update(grads, state, params)
        return {path: u.get_value() for path, u in nnx.to_flat_state(out)}  # pyright: ignore

    got, want = jax.jit(updates)(grads, params), jax.jit(updates)(without(grads), without(params))
    assert not any(u.any() for path, u in got.items() if path[-1] == "bias_E")
    assert got.keys() - want.keys() == {("bias_E",)}
    for path, u in want.items():
        np.testing.assert_allclose(got[path], u, rtol=1e-5, atol=1e-9, err_msg=str(path))


# --- In the step


@pytest.fixture(scope="module")
def on_one_device() -> tuple[TrainState, TrainState, list[dict]]:
    """A state to begin with, the one after three steps of six, and the metrics."""
    cfg = run_config(6, it=learner(MAVERICK))
    start = fresh(cfg)
    biased = with_biases(start.learners["it"].params, lambda shape: np.linspace(-0.2, 0.3, 8).reshape(shape))
    start.learners["it"] = start.learners["it"]._replace(params=biased)
    return (start, *run(cfg, on(), 3, start))


def test_each_step_follows_its_own_load(on_one_device):
    start, after, metrics = on_one_device
    want = biases(start.learners["it"].params)[1].copy()
    for one in metrics:
        load_LE = one["it"]["sums"].load
        assert (load_LE.sum(axis=1) == B * T * 3 / 4).all()  # padding is not counted
        want += np.float32(U) * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    np.testing.assert_allclose(biases(after.learners["it"].params)[1], want, rtol=1e-5, atol=1e-7)


def test_a_mesh_gives_the_biases_of_one_device(on_one_device):
    start, after, metrics = on_one_device
    got, on_mesh = run(run_config(6, it=learner(MAVERICK)), on(8, fsdp=2, expert=2, context=1, tensor=2), 3, start)
    for a, b in zip(on_mesh, metrics, strict=True):
        np.testing.assert_array_equal(a["it"]["sums"].load, b["it"]["sums"].load)
    np.testing.assert_array_equal(biases(got.learners["it"].params)[1], biases(after.learners["it"].params)[1])


def test_microbatches_load_as_the_whole(on_one_device):
    start, _, metrics = on_one_device
    parts = learner(MAVERICK, microbatches=4, remat="block")
    grads, sums, _ = jax.jit(gradient(parts, on(), 1))(start.learners["it"].params, batches(1)[0])
    np.testing.assert_array_equal(sums.load, metrics[0]["it"]["sums"].load)
    assert not biases(grads)[1].any()


def test_layers_in_a_loop_have_the_loads_of_layers_one_by_one():
    model = replace(SCOUT, num_layers=3, nope_every=3)  # two local layers, which `nested` scans over
    params = initial(model, lambda shape: np.random.default_rng(1).normal(size=shape)).params
    graph, batch = graphdef(learner(model)), batches(1)[0]

    @partial(jax.jit, static_argnames="remat")
    def loads(params: nnx.State, batch: Batch, remat: str) -> jax.Array:
        out = nnx.merge(graph, params)(batch.tokens, batch.positions, batch.segment_ids, Execution(remat=remat))
        return out.router.load

    np.testing.assert_array_equal(*(loads(params, batch, remat=remat) for remat in ("none", "nested")))


def test_teachers_and_students_have_their_own():
    """A frozen teacher's bias stays; that of a student, who teaches on, follows its load and falls; some have none."""
    cfg = run_config(
        4, behemoth=learner(SMALL, optimizer=None),
        maverick=learner(SMALL, distillation=Distillation("behemoth")),
        scout=learner(replace(SMALL, router_bias=False), distillation=Distillation("maverick")),
    )  # fmt: skip
    start = fresh(cfg)
    frozen = start.learners["behemoth"]
    start.learners["behemoth"] = frozen._replace(params=with_biases(frozen.params, np.ones))
    half, metrics = run(cfg, on(), 2, start)
    loads = [one["maverick"]["sums"].load for one in metrics]
    want = U * sum(np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE) for load_LE in loads)
    np.testing.assert_allclose(biases(half.learners["maverick"].params)[1], want, rtol=1e-6)
    end, _ = run(cfg, on(), 4, half)
    for state in (half, end):
        assert (biases(state.learners["behemoth"].params)[1] == 1).all()
        assert biases(state.learners["maverick"].params)[1].any() == (state is half)
        assert not biases(state.learners["scout"].params)


# --- In a run


def test_a_skewed_router_is_evened():
    """All tokens share a direction that the first expert's logit likes: paired runs, with the bias and without."""
    model = replace(SMALL, embed_dim=48)
    direction_D = np.random.default_rng(2).normal(size=48).astype(np.float32)

    def imbalance(speed: float) -> np.ndarray:
        """Load of the busiest expert over the mean, by step, while the bias follows it."""
        cfg = run_config(80, it=learner(model, router_bias_speed=speed))
        start = fresh(cfg)
        params = start.learners["it"].params
        params["embedding"]["table_VD"][...] += 0.2 * direction_D[None]
        params["blocks"]["layers"][1]["ffn"]["router_DE"][...][:, :, 0] += 0.05 * direction_D[None]
        _, metrics = run(cfg, on(), 40, start)
        load_SE = np.concatenate([one["it"]["sums"].load for one in metrics])
        return load_SE.max(axis=1) / load_SE.mean(axis=1)

    with_bias, without = imbalance(0.05), imbalance(0.0)
    assert with_bias[0] == without[0] > 3  # of 4, with four experts
    assert with_bias[-10:].mean() < 2.2 and without[-10:].mean() > 3


def test_a_checkpoint_holds_the_biases(on_one_device, tmp_path):
    """Written after one step, restored, and gone on with: bit for bit what the unbroken run has after three."""
    cfg, (start, after, _) = run_config(6, it=learner(MAVERICK)), on_one_device
    first, _ = run(cfg, on(), 1, start)
    assert biases(first.learners["it"].params)[1].any()
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.asarray, first), {}, {})
    with Checkpoints(str(tmp_path)) as checkpoints:
        restored, _ = checkpoints.restore(1, abstract_state(cfg, on()))
    again, _ = run(cfg, on(), 3, restored)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_would_never_fall_is_refused_in_a_line():
    with pytest.raises(
        ValueError, match=r"it's router bias .* none of 40 steps: the nearest that leaves one is 0\.025$"
    ):
        run_config(40, it=learner(optimizer=OptimizerConfig(decay=0.0)))
    with pytest.raises(ValueError, match=r"none of 40 steps"):  # a share of less than a step
        run_config(40, it=learner(optimizer=OptimizerConfig(decay=0.01)))
    for steps in (1, 2, 3, 7, 30, 150, 999, 12345):
        run_config(steps, it=learner(optimizer=OptimizerConfig(decay=float(f"{1 / steps:.2g}"))))
    run_config(40, it=learner(replace(SCOUT, router_bias=False), optimizer=OptimizerConfig(decay=0.0)))
    run_config(40, it=learner(), frozen=learner(optimizer=None))
    with pytest.raises(ValueError, match="router_bias_speed must be at least 0"):
        learner(router_bias_speed=-1.0)
