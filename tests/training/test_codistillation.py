"""Learners who teach: the shared pass equals separate ones, frozen means frozen, and one learner is pretraining."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from data.batch import Batch
from llama4_jax.config import ModelConfig, tiny_behemoth, tiny_maverick, tiny_scout
from training.config import Distillation, Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.mesh import make_mesh
from training.state import TrainState, abstract_state, create_state
from training.step import make_train_step

B, T, V, STEPS = 4, 32, 64, 3


def shrink(model: ModelConfig) -> ModelConfig:
    """A local and a global layer; widths still differ."""
    sizes = dict(vocab_size=V, chunk=16, num_heads=2, num_kv_heads=2, head_dim=16, num_experts=2)
    layers = dict(num_layers=2, nope_every=2)
    return replace(model, **sizes, **layers, embed_dim=model.embed_dim // 4, expert_dim=32, dense_dim=64, floor_scale=8)


# Adam divides rounding by rounding where a gradient is near 0; beside this epsilon such weights do not move.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup=2, decay=0.5, eps=1e-3)
TEACHER = Learner(shrink(tiny_behemoth()), OPTIMIZER, compute_dtype="float32")
FROZEN = replace(TEACHER, optimizer=None)


def student(model: ModelConfig, **kwargs) -> Learner:
    return Learner(shrink(model), OPTIMIZER, Distillation("behemoth", **kwargs), compute_dtype="float32")


SCOUT, MAVERICK = student(tiny_scout()), student(tiny_maverick(), soft=0.5, schedule="constant", temperature=2.0)


@cache
def _on_host(learners: tuple) -> TrainState:
    cfg = RunConfig("test", dict(learners), train=TrainConfig(steps=STEPS, batch=B, seq_len=T))
    return jax.tree.map(np.asarray, create_state(cfg, make_mesh(MeshConfig(), jax.devices()[:1])))


def state_on(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """`create_state`, compiled once for one device and then placed (compiling it for every mesh takes its time)."""
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    return jax.device_put(_on_host(tuple(cfg.learners.items())), placed)


def run(learners: dict[str, Learner], mesh: MeshConfig = MeshConfig(), devices: int = 1):  # noqa: B008
    """States before and after STEPS steps, and each step's metrics."""
    cfg = RunConfig("test", learners, train=TrainConfig(steps=STEPS, batch=B, seq_len=T))
    at = make_mesh(mesh, jax.devices()[:devices])
    state, step, metrics = state_on(cfg, at), make_train_step(cfg, at, 1), []
    before = jax.tree.map(np.asarray, state)
    rng = np.random.default_rng(0)
    ones, zeros = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    for _ in range(STEPS):
        tokens = (rng.zipf(1.3, (B, T + 1)) % V).astype(np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, np.arange(T, dtype=np.int32)[None].repeat(B, 0),
                      ones.astype(np.float32), zeros, ones > 0, zeros)  # fmt: skip
        state, one = step(state, batch)
        metrics.append(jax.tree.map(np.asarray, one))
    return before, jax.tree.map(np.asarray, state), metrics


def assert_same(a, b, tolerance: float = 0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.max(np.abs(x - y), initial=0) <= tolerance * np.max(np.abs(y), initial=0)


@pytest.fixture(scope="module")
def shared():
    return run({"behemoth": FROZEN, "maverick": MAVERICK, "scout": SCOUT})


def test_one_teacher_pass_into_two_students_equals_two_runs(shared):
    _, together, _ = shared
    for name, learner in (("maverick", MAVERICK), ("scout", SCOUT)):
        _, alone, _ = run({"behemoth": FROZEN, name: learner})
        assert_same(together.learners[name].params, alone.learners[name].params, 1e-5)


def test_a_frozen_teacher_does_not_change_by_a_bit(shared):
    before, after, metrics = shared
    assert_same(after.learners["behemoth"].params, before.learners["behemoth"].params)
    assert after.learners["behemoth"].optimizer is None
    assert set(metrics[0]) == {"maverick", "scout"}


def test_students_learn_from_the_teacher(shared):
    _, after, metrics = shared
    _, from_labels, _ = run({"scout": replace(SCOUT, distillation=Distillation())})
    difference = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b)), after.learners["scout"].params, from_labels.learners["scout"].params
    )
    assert max(jax.tree.leaves(difference)) > 1e-3
    assert all(m["scout"]["sums"].by_domain["divergence"].sum() > 0 for m in metrics)


def test_pretraining_is_the_case_of_one_learner():
    """A learner beside others that do not teach it takes the very steps it takes alone."""
    labels_only = replace(SCOUT, distillation=Distillation())
    _, alone, _ = run({"scout": labels_only})
    _, beside, _ = run({"behemoth": TEACHER, "maverick": MAVERICK, "scout": labels_only})
    assert_same(beside.learners["scout"].params, alone.learners["scout"].params, 1e-5)


def test_a_co_trained_teacher_is_not_touched_by_its_students():
    _, alone, _ = run({"behemoth": TEACHER})
    before, taught, _ = run({"behemoth": TEACHER, "scout": SCOUT})
    assert_same(taught.learners["behemoth"].params, alone.learners["behemoth"].params, 1e-5)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before.learners, taught.learners)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=2), dict(fsdp=1, context=2, expert=2)], ids=str)
def test_co_distillation_on_a_mesh_equals_one_device(sizes, shared):
    """Three learners of different shapes on one mesh."""
    _, _, want_metrics = shared
    _, _, metrics = run({"behemoth": FROZEN, "maverick": MAVERICK, "scout": SCOUT}, MeshConfig(**sizes), 4)
    for a, b in zip(metrics, want_metrics, strict=True):
        for name in ("maverick", "scout"):
            ours, theirs = (x[name]["sums"].by_domain for x in (a, b))
            for what in ("ce", "divergence", "weighted", "agreement", "teacher_ce"):
                np.testing.assert_allclose(ours[what], theirs[what], rtol=1e-4)


def test_microbatches_of_teacher_and_student_may_differ():
    """With the router's losses off (they are of a microbatch) the parts sum to the whole."""
    quiet = {"behemoth": TEACHER, "scout": SCOUT}
    quiet = {name: replace(learner, router_balance=0.0, router_z=0.0) for name, learner in quiet.items()}
    parts = {"behemoth": replace(quiet["behemoth"], microbatches=2), "scout": replace(quiet["scout"], microbatches=4)}
    _, _, want = run(quiet)
    _, _, got = run(parts)
    for a, b in zip(got, want, strict=True):
        ours, theirs = (x["scout"]["sums"].by_domain for x in (a, b))
        np.testing.assert_allclose(ours["divergence"], theirs["divergence"], rtol=1e-4)
        np.testing.assert_allclose(a["scout"]["grad_norm"], b["scout"]["grad_norm"], rtol=1e-3)


POLICIES = {
    "disagreement": dict(weighting="disagreement", taid_start=0.3, divergence="jsd", skew=0.5, schedule="linear",
                         hard="one", ema=0.5),
    "gradient_norm": dict(weighting="gradient_norm", schedule="constant", ema=0.5),
    "competence": dict(weighting="competence", schedule="constant", ema=0.5),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_a_mesh_equals_one_device(policy):
    """Weights depend on running means, so that the third step's differ wherever a statistic does."""
    learners = {"behemoth": FROZEN, "scout": student(tiny_scout(), **POLICIES[policy])}
    _, state, want = run(learners)
    _, on_mesh, got = run(learners, MeshConfig(fsdp=1, expert=2, tensor=2), 4)
    for a, b in zip(got, want, strict=True):
        for name, sums in b["scout"]["sums"].by_domain.items():
            np.testing.assert_allclose(a["scout"]["sums"].by_domain[name], sums, rtol=2e-4, err_msg=name)
    for name, value in state.learners["scout"].weighting._asdict().items():
        np.testing.assert_allclose(on_mesh.learners["scout"].weighting._asdict()[name], value, rtol=2e-3, err_msg=name)


def test_who_teaches_whom_is_checked():
    def build(**learners: Learner) -> RunConfig:
        return RunConfig("test", learners, train=TrainConfig(batch=B, seq_len=T))

    with pytest.raises(ValueError, match=r"scout's teacher 'behemoth' is not among the learners before it: none"):
        build(scout=SCOUT, behemoth=TEACHER)
    with pytest.raises(ValueError, match="share the vocabulary"):
        build(behemoth=TEACHER, scout=replace(SCOUT, model=replace(SCOUT.model, vocab_size=2 * V)))
    with pytest.raises(ValueError, match="scout is frozen"):
        build(behemoth=TEACHER, scout=replace(SCOUT, optimizer=None))
    with pytest.raises(ValueError, match="needs a learner with an optimizer"):
        build(behemoth=FROZEN)
