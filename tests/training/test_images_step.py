"""Steps with images: sharded equals unsharded, what is held does not move, and nothing leaks between rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from data.batch import Batch
from llama4_jax.config import ModelConfig, VisionConfig, scout, tiny_scout, with_vision
from training.config import Distillation, Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.mesh import BATCH_SPEC, check_fits, make_mesh
from training.state import (
    TrainState,
    abstract_state,
    create_state,
    execution,
    graphdef,
    run_model,
    storage_rules,
)
from training.step import gradient, make_train_step

B, T, J, M, V = 8, 32, 2, 4, 64
TOWER = VisionConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=64, image_size=16, patch_size=4, adapter_dim=16)
MODEL = with_vision(
    replace(tiny_scout(), vocab_size=V, chunk=16, embed_dim=32, head_dim=16, expert_dim=32, dense_dim=64, floor_scale=8,
            num_layers=2, nope_every=2), TOWER)  # fmt: skip


def run_config(model: ModelConfig = MODEL, vision: str = "all", **learners: Learner) -> RunConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=1, vision=vision)  # pyright: ignore[reportArgumentType]
    learner = Learner(model, optimizer, compute_dtype="float32", remat="block")
    train = TrainConfig(steps=3, batch=B, seq_len=T, tiles=J)
    return RunConfig("test", learners or {"scout": learner}, train=train)


def batches(n: int = 3, rows_with_images: tuple[int, ...] = (0, 3, 7)) -> list[Batch]:
    """Random text; some rows hold two tiles' tokens, at different places."""
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        tokens = rng.integers(8, V, (B, T + 1), np.int32)
        slots, tiles = np.full((B, T), -1, np.int32), np.zeros((B, J, 16, 16, 3), np.uint8)
        for row in rows_with_images:
            tiles[row] = rng.integers(0, 256, tiles[row].shape, np.uint8)
            for tile in range(J):
                at = row + tile * (M + 3)
                slots[row, at : at + M] = tile * M + np.arange(M)
        mask = np.ones((B, T), np.float32)
        mask[:, :-1] = slots[:, 1:] < 0
        ones = np.ones((B, T), np.int32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
        out.append(
            Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, mask, 0 * ones, ones > 0, 0 * ones, tiles, slots)
        )
    return out


@cache
def on_host(cfg_key: str = "all") -> TrainState:
    return jax.tree.map(
        np.asarray, create_state(run_config(vision=cfg_key), make_mesh(MeshConfig(), jax.devices()[:1]))
    )


def state_on(cfg: RunConfig, mesh: Mesh) -> TrainState:
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    return jax.device_put(on_host(), placed)


def put(batch: Batch, mesh: Mesh) -> Batch:
    return jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))


@cache
def gradients(mesh_cfg: MeshConfig, devices: int, microbatches: int = 1) -> tuple[float, dict[tuple, np.ndarray]]:
    cfg = run_config()
    learner = replace(cfg.learners["scout"], microbatches=microbatches)
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    check_fits(replace(cfg, learners={"scout": learner}), mesh)
    take = jax.jit(gradient(learner, mesh, 1))
    grads, sums, _ = take(state_on(cfg, mesh).learners["scout"].params, put(batches()[0], mesh))
    loss = float(sums.by_domain["ce"].sum() / sums.tokens)
    return loss, {path: np.asarray(g.get_value()) for path, g in nnx.to_flat_state(grads)}


MESHES = {
    "context_tensor": MeshConfig(fsdp=2, context=2, tensor=2),
    "expert": MeshConfig(fsdp=-1, expert=4),
    "replica_tensor": MeshConfig(replica=2, fsdp=-1, tensor=2),
}


@pytest.mark.parametrize(
    "name", ["context_tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("expert", "replica_tensor"))]
)
def test_sharded_equals_unsharded_with_images_in_some_rows(name):
    loss, whole = gradients(MeshConfig(), 1)
    sharded_loss, sharded = gradients(MESHES[name], 8)
    assert abs(loss - sharded_loss) < 1e-5
    assert all(np.abs(g).max() > 0 for path, g in whole.items() if path[0] == "vision")
    for path, g in whole.items():
        np.testing.assert_allclose(sharded[path], g, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize(("sizes", "over"), [
    (dict(fsdp=64, context=4), ("fsdp",)), (dict(fsdp=256, expert=16), ("expert",)),
    (dict(fsdp=32, context=4), ("fsdp", "context")), (dict(fsdp=3), ()),
])  # fmt: skip
def test_the_towers_width_is_stored_over_what_divides_it(sizes, over):
    chosen = storage_rules(with_vision(scout()), dict(fsdp=1, expert=1, context=1) | sizes)["tower"]
    assert math.prod(({"fsdp": 1, "expert": 1, "context": 1} | sizes)[n] for n in chosen) == math.prod(
        sizes[n] for n in over
    )


@pytest.mark.parametrize("held", ["projector", pytest.param("none", marks=pytest.mark.slow)])
def test_what_is_held_does_not_move(held):
    cfg, mesh = run_config(vision=held), make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(cfg, mesh)
    before = {p: np.asarray(x.get_value()) for p, x in nnx.to_flat_state(state.learners["scout"].params)}
    moments = {path for path, _ in nnx.to_flat_state(state.learners["scout"].optimizer[1].chosen.mu)}
    step = make_train_step(cfg, mesh, 1)
    for batch in batches(2):
        state, _ = step(state, put(batch, mesh))
    after = {p: np.asarray(x.get_value()) for p, x in nnx.to_flat_state(state.learners["scout"].params)}
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    learns = {p for p in before if p[0] != "vision" or (held == "projector" and p[1] == "projector")}
    assert moved == learns == moments


def test_images_reach_their_own_rows_alone():
    """Another image in row 3 changes the gradient, and the loss of no other row."""
    cfg, mesh = run_config(), make_mesh(MeshConfig(), jax.devices()[:1])
    learner = cfg.learners["scout"]
    run, model = execution(learner, mesh), graphdef(learner)
    params = jax.tree.map(jax.numpy.asarray, on_host().learners["scout"].params)
    forward = jax.jit(lambda batch: run_model(model, params, batch, run).hidden)
    batch = batches()[0]
    other = batch._replace(tiles=np.where(np.arange(B)[:, None, None, None, None] == 3, 255 - batch.tiles, batch.tiles))
    changed = np.abs(np.asarray(forward(batch)) - np.asarray(forward(other))).max(axis=2)
    assert changed[3, 3:].all() and not changed[3, :3].any()  # from its first tile token on
    assert not np.delete(changed, 3, axis=0).any()


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_that_sees_the_same_tiles():
    """The teacher has a tower of its own, of another width; what has no target (loss mask 0) counts nothing."""
    wider = replace(TOWER, embed_dim=32, mlp_dim=128)
    teacher = Learner(with_vision(replace(MODEL, embed_dim=64), wider), None, compute_dtype="float32")
    student = replace(
        run_config().learners["scout"], distillation=Distillation("behemoth", soft=1.0, schedule="constant")
    )
    cfg, mesh = run_config(behemoth=teacher, scout=student), make_mesh(MeshConfig(), jax.devices()[:1])
    state, step = create_state(cfg, mesh), make_train_step(cfg, mesh, 1)
    keep = jax.tree.map(np.asarray, state)
    first = batches()[0]
    _, metrics = step(state, put(first, mesh))
    kl = metrics["scout"]["sums"].by_domain["divergence"].sum()
    assert float(metrics["scout"]["sums"].tokens) == first.loss_mask.sum()
    assert float(kl) > 0
    blind = first._replace(tiles=255 - first.tiles)
    _, other = step(
        jax.device_put(keep, jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))), put(blind, mesh)
    )
    assert abs(float(other["scout"]["sums"].by_domain["divergence"].sum()) - float(kl)) > 1e-4


def test_configurations_that_cannot_be():
    text = replace(MODEL, vision=None)
    with pytest.raises(ValueError, match="scout's model has no vision tower"):
        run_config(text)
    small = Learner(with_vision(text, replace(TOWER, image_size=8)), None)
    with pytest.raises(ValueError, match="learners of one run see the same tiles"):
        run_config(teacher=small, scout=run_config().learners["scout"])
    asked = replace(run_config().learners["scout"], distillation=Distillation("stream:host:1"))
    with pytest.raises(ValueError, match="by tokens alone"):
        run_config(scout=asked)
    with pytest.raises(ValueError, match=r"train.tiles \(2\) must be a multiple of mesh.context \(4\): the nearest is"):
        check_fits(run_config(), make_mesh(MeshConfig(context=4), jax.devices()))
