"""The step: sharded equals unsharded, accumulated equals whole, padding is nothing, and it compiles once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from llama4_jax.config import tiny_maverick, tiny_scout
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.mesh import BATCH_SPEC, check_fits, make_mesh
from training.program import walk
from training.state import TrainState, abstract_state, create_state, execution
from training.step import gradient, make_train_step

B, T, CHUNK, V, DOMAINS, STEPS = 8, 64, 16, 128, 2, 5
SIZES = dict(
    vocab_size=V,
    chunk=CHUNK,
    embed_dim=32,
    head_dim=16,
    expert_dim=32,
    dense_dim=64,
    floor_scale=8,
    num_layers=4,
    nope_every=2,
)  # two blocks of a local and a global layer


def run_config(model=None, **train) -> RunConfig:
    learner = Learner(
        model or replace(tiny_scout(), **SIZES), OptimizerConfig(learning_rate=1e-2, warmup=1), compute_dtype="float32"
    )
    return RunConfig("test", {"scout": learner}, train=TrainConfig(**dict(steps=STEPS, batch=B, seq_len=T) | train))


def batches(n: int = STEPS, seed: int = 0) -> list[Batch]:
    """Skewed random tokens in chunk-aligned rows: a long document, fillers, and padding in every other row."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([1, 2, 3, 4], [40, 8, 10, 6])[None].repeat(B, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (40, 8, 10, 6)])[None].repeat(B, 0).astype(np.int32)
    segments[::2, 58:], positions[::2, 58:] = 0, 0
    last = np.diff(segments, axis=1, append=0) != 0
    mask = ((segments > 0) & ~last).astype(np.float32)
    out = []
    for _ in range(n):
        tokens = (rng.zipf(1.3, (B, T + 1)) % V).astype(np.int32)
        domain = (segments % DOMAINS).astype(np.int32)
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask, domain,
                         np.ones((B, T), bool), np.zeros((B, T), np.int32)))  # fmt: skip
    return out


@cache
def _on_host(learners: tuple) -> TrainState:
    cfg = RunConfig("test", dict(learners), train=TrainConfig(steps=STEPS, batch=B, seq_len=T))
    return jax.tree.map(np.asarray, create_state(cfg, make_mesh(MeshConfig(), jax.devices()[:1])))


def state_on(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """`create_state`, compiled once for one device and then placed (compiling it for every mesh takes its time)."""
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    return jax.device_put(_on_host(tuple(cfg.learners.items())), placed)


def losses(cfg: RunConfig, mesh_cfg: MeshConfig, devices: int) -> tuple[np.ndarray, int]:
    """Loss of each step, and how often the step was compiled."""
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    check_fits(cfg, mesh)
    state, step, out = state_on(cfg, mesh), make_train_step(cfg, mesh, DOMAINS), []
    for batch in batches():
        state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)))
        sums = metrics["scout"]["sums"]
        out.append((sums.by_domain["ce"].sum() + 0.01 * sums.balance + 0.001 * sums.z) / sums.tokens)
    return np.array(out), step._cache_size()  # pyright: ignore[reportFunctionMemberAccess]


@pytest.fixture(scope="module")
def on_one_device() -> np.ndarray:
    return losses(run_config(), MeshConfig(), 1)[0]


MESHES = [
    dict(fsdp=8),
    dict(expert=4, fsdp=2),
    dict(context=2, tensor=2, fsdp=2),
    dict(replica=2, fsdp=4),
    dict(context=8),  # shards of half a chunk
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(sizes, on_one_device):
    got, compilations = losses(run_config(), MeshConfig(**dict(fsdp=1) | sizes), 8)
    assert on_one_device[0] - on_one_device[-1] > 0.3  # it learns, so later steps depend on the gradients
    np.testing.assert_allclose(got, on_one_device, rtol=1e-4)
    assert compilations == 1


def test_gradients_on_a_mesh_are_those_of_one_device():
    """Adam hides a factor on a whole gradient, so the gradients themselves are compared."""
    cfg, batch = run_config(), batches(1)[0]

    def gradients(sizes: MeshConfig, devices: int):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        params = state_on(cfg, mesh).learners["scout"].params
        placed = jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
        return jax.jit(gradient(cfg.learners["scout"], mesh, DOMAINS))(params, placed)[0]

    want = gradients(MeshConfig(), 1)
    got = gradients(MeshConfig(fsdp=1, expert=2, context=2, tensor=2), 8)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(np.asarray(a) - np.asarray(b))) <= 1e-5 * np.max(np.abs(b))


def test_maverick_on_a_mesh_gives_the_losses_of_one_device():
    cfg = run_config(replace(tiny_maverick(), **SIZES))
    got, _ = losses(cfg, MeshConfig(fsdp=2, expert=2, tensor=2), 8)
    np.testing.assert_allclose(got, losses(cfg, MeshConfig(), 1)[0], rtol=1e-4)


@pytest.mark.parametrize("remat", ["none", "layer", "block", "nested"])
def test_microbatches_sum_to_the_batch(remat):
    """With the router's losses off (they are of a microbatch), summing parts is exact."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    learner = replace(run_config().learners["scout"], router_balance=0.0, router_z=0.0, remat=remat)
    in_four = replace(learner, microbatches=4)
    params = state_on(run_config(), mesh).learners["scout"].params
    batch = batches(1)[0]
    whole, sums, _ = jax.jit(gradient(learner, mesh, DOMAINS))(params, batch)
    parts, part_sums, _ = jax.jit(gradient(in_four, mesh, DOMAINS))(params, batch)
    assert part_sums.tokens == sums.tokens == batch.loss_mask.sum()
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_padding_is_nothing():
    """Tokens under padding change neither loss, gradient nor the router's statistics."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    cfg = run_config()
    params = state_on(cfg, mesh).learners["scout"].params
    apply = jax.jit(gradient(cfg.learners["scout"], mesh, DOMAINS))
    batch = batches(1)[0]
    padding = batch.segment_ids == 0
    assert padding.any()
    other = batch._replace(tokens=np.where(padding, 7, batch.tokens), labels=np.where(padding, 9, batch.labels))
    for a, b in zip(*(jax.tree.leaves(apply(params, x)) for x in (batch, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_gradients_may_be_reduced_in_bfloat16():
    mesh = make_mesh(MeshConfig(fsdp=8))
    cfg = run_config()
    params = state_on(cfg, mesh).learners["scout"].params
    batch = jax.device_put(batches(1)[0], NamedSharding(mesh, BATCH_SPEC))
    learner = cfg.learners["scout"]
    exact = jax.jit(gradient(learner, mesh, DOMAINS))(params, batch)[0]
    reduced = jax.jit(gradient(replace(learner, reduce_dtype="bfloat16"), mesh, DOMAINS))(params, batch)[0]
    errors = [np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in
              zip(jax.tree.leaves(reduced), jax.tree.leaves(exact), strict=True)]  # fmt: skip
    assert 1e-5 < max(errors) < 0.02  # it does round, and no more than eight roundings of 2^-9 each


def test_initial_weights_are_the_same_on_every_mesh():
    cfg = run_config()
    made = create_state(cfg, make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2)))
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(_on_host(tuple(cfg.learners.items()))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_weights_are_stored_where_the_rules_say():
    mesh = make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2))
    params = abstract_state(run_config(), mesh).learners["scout"].params
    experts = params["blocks"]["layers"][0]["ffn"]["experts"]["wi_gate_EDF"].get_value()
    E, D, F = experts.shape[1:]
    assert experts.sharding.shard_shape(experts.shape) == (2, E // 2, D // 2, F // 2)
    wq = params["blocks"]["layers"][0]["attention"]["wq_DNH"].get_value()
    assert wq.sharding.shard_shape(wq.shape) == (2, wq.shape[1] // 4, wq.shape[2] // 2, wq.shape[3])


@pytest.mark.parametrize("dispatch", ["all_to_all", "fsdp"])
def test_weights_gathered_as_gpus_do_it_are_the_same(monkeypatch, dispatch):
    """To the bit, and their gradients too: gathered in front and moved, or along the dimension they are stored over."""
    monkeypatch.setattr("llama4_jax.axes.TOGETHER", 0)  # none of them flat
    cfg, mesh = run_config(replace(tiny_maverick(), **SIZES)), make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2))
    params = create_state(cfg, mesh).learners["scout"].params["blocks"]["layers"][1]
    run = replace(execution(cfg.learners["scout"], mesh), dispatch=dispatch)
    specs = run.specs(params)

    def fetched(platform):
        def local(params):
            whole, back = jax.vjp(replace(run, platform=platform).fetch, params)
            return jax.tree.map(lambda x: x[None], whole), back(jax.tree.map(jnp.sin, whole))[0]  # pyright: ignore

        rest = jax.tree.map(lambda _: P(mesh.axis_names), specs)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(rest, specs), check_vma=False))

    found = {platform: fetched(platform) for platform in ("tpu", "gpu")}
    for a, b in zip(*(jax.tree.leaves(f(params)) for f in found.values()), strict=True):
        np.testing.assert_array_equal(a, b)
    inside = {
        platform: {
            (one.eqn.params["tiled"], one.eqn.params["all_gather_dimension"])
            for one in walk(f.trace(params).jaxpr.jaxpr) if one.name == "all_gather"
        } for platform, f in found.items()
    }  # fmt: skip
    assert inside["gpu"] == {(False, 0)} and all(tiled for tiled, _ in inside["tpu"]) and (True, 2) in inside["tpu"]


def test_what_does_not_divide_is_refused_in_a_line():
    mesh = make_mesh(MeshConfig(tensor=8, fsdp=1))
    with pytest.raises(ValueError, match=r"scout: num_heads \(4\) must be a multiple of tensor = 8"):
        check_fits(run_config(), mesh)
    cfg = run_config()
    two_parts = replace(cfg, learners={"scout": replace(cfg.learners["scout"], microbatches=2)})
    with pytest.raises(ValueError, match=r"batch \(8\).* = 16: the nearest is 16"):
        check_fits(two_parts, make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match="needs 3 devices, but there are 8"):
        make_mesh(MeshConfig(fsdp=3))
