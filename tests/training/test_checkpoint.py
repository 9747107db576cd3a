"""Checkpoints: bit-equal on any mesh, chunked by block and expert, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from training.checkpoint import Checkpoints, load_config, named_leaves, restore_params
from training.config import Distillation, Learner, MeshConfig, OptimizerConfig, RunConfig, Stage, TrainConfig
from training.mesh import make_mesh
from training.record import RESUMABLE, check_resumable, config_from_json, run_record
from training.state import abstract_state, create_state

HASH = "0" * 64


@pytest.fixture
def saved(make_run):
    """A run whose state was saved at step 3 from a mesh of fsdp 8: its config, folder and state."""
    cfg = make_run()
    state = create_state(cfg, make_mesh(MeshConfig(fsdp=8)))
    with Checkpoints(cfg.folder, keep=2) as checkpoints:
        checkpoints.save(3, state, {"row": 5}, run_record(cfg, HASH))
    return SimpleNamespace(cfg=cfg, folder=cfg.folder, state=state)


def test_another_mesh_restores_the_same_bits(saved):
    like = abstract_state(saved.cfg, make_mesh(MeshConfig(expert=2, fsdp=4)))
    with Checkpoints(saved.folder) as checkpoints:
        state, position = checkpoints.restore(3, like)
    assert position == {"row": 5}
    assert jax.tree.structure(state) == jax.tree.structure(saved.state)  # the declarations of weights included
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, (state, saved.state, like)), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
        assert ours.sharding == wanted.sharding
    assert state.learners["scout"].params["unembedding"]["kernel_DV"].axes == ("embed", "vocab")


@pytest.mark.parametrize("devices", [1, 8])
def test_chunks_on_disk_hold_one_block_and_one_expert(make_run, devices):
    cfg = make_run()
    state = create_state(cfg, make_mesh(MeshConfig(), jax.devices()[:devices]))
    with Checkpoints(cfg.folder, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, run_record(cfg, HASH))

    def chunk(name: str) -> list[int]:
        kvstore = {"driver": "ocdbt", "base": f"file://{cfg.folder}/checkpoints/1/state/", "path": f"{name}/"}
        return list(ts.open({"driver": "zarr", "kvstore": kvstore}).result().spec().to_json()["metadata"]["chunks"])

    D = 32 // devices  # a device's share of the embed dimension
    layers = "learners.scout.params.blocks.layers"
    assert chunk(f"{layers}.1.ffn.experts.wi_gate_EDF") == [1, 1, D, 16]  # of [2 blocks, 4 experts, 32, 16]
    assert chunk(f"{layers}.1.ffn.experts.wo_EFD") == [1, 1, 16, D]
    assert chunk(f"{layers}.0.attention.wq_DNH") == [1, D, 2, 8]
    assert chunk("learners.scout.optimizer.1.nu.blocks.layers.1.ffn.experts.wo_EFD") == [1, 1, 16, D]
    assert chunk("learners.scout.params.unembedding.kernel_DV") == [D, 320]


def test_saving_does_not_see_the_next_steps(saved):
    """The step donates its state: the copy that is written must not be what the next step overwrites."""
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(lambda x: x.copy(), saved.state)
    with Checkpoints(saved.folder, keep=2) as checkpoints:
        checkpoints.save(4, state, {}, run_record(saved.cfg, HASH))
        for _ in range(5):
            state = bump(state)
    with Checkpoints(saved.folder) as checkpoints:
        again, _ = checkpoints.restore(4, abstract_state(saved.cfg, make_mesh(MeshConfig(fsdp=8))))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(saved.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_saving_does_not_see_what_later_becomes_of_a_place(saved, monkeypatch):
    """Orbax writes JSON in the background, while the run goes on counting in the same lists and dictionaries."""
    given, real = [], ocp.args.JsonSave
    monkeypatch.setattr(ocp.args, "JsonSave", lambda item: given.append(item) or real(item))
    place = {"guard": {"losses": {"scout": [2.5]}}}
    with Checkpoints(saved.folder, keep=2) as checkpoints:
        checkpoints.save(4, saved.state, place, run_record(saved.cfg, HASH))
        place["guard"]["losses"]["scout"].append(2.25)
        assert given[0] == {"guard": {"losses": {"scout": [2.5]}}}


def test_only_the_newest_are_kept(saved):
    with Checkpoints(saved.folder, keep=2) as checkpoints:
        for step in (5, 7):
            checkpoints.save(step, saved.state, {}, run_record(saved.cfg, HASH))
    with Checkpoints(saved.folder) as checkpoints:
        assert checkpoints.latest == 7
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .* there are: \[5, 7\]"):
            checkpoints.find(3)


def test_weights_alone(saved):
    weights = restore_params(saved.folder)
    assert (weights.config, weights.learner, weights.step) == (saved.cfg, "scout", 3)
    wanted = jax.tree.leaves(saved.state.learners["scout"].params)
    for ours, theirs in zip(jax.tree.leaves(weights.params), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
        assert ours.devices() == {jax.devices()[0]}
    assert load_config(saved.folder) == saved.cfg
    with pytest.raises(ValueError, match=r"no learner 'maverick', only scout"):
        restore_params(saved.folder, "maverick")
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        restore_params(saved.folder + "x")


def test_a_leaf_that_does_not_fit_is_named(saved):
    like = abstract_state(saved.cfg, make_mesh(MeshConfig(fsdp=8)))
    name = "learners.scout.params.unembedding.kernel_DV"

    def changed(**to):
        def change(leaf):
            return jax.ShapeDtypeStruct(**dict(shape=leaf.shape, dtype=leaf.dtype, sharding=leaf.sharding) | to)

        params = jax.tree.map(lambda x: change(x) if x.shape == (32, 320) else x, like.learners["scout"].params)
        return like._replace(learners={"scout": like.learners["scout"]._replace(params=params)})

    with Checkpoints(saved.folder) as checkpoints:
        with pytest.raises(ValueError, match=rf"{name} is float32\[32, 320\], this run needs bfloat16\[32, 320\]"):
            checkpoints.restore(3, changed(dtype=jax.numpy.bfloat16))
        with pytest.raises(ValueError, match=rf"{name} is float32\[32, 320\], this run needs float32\[32, 640\]"):
            checkpoints.restore(3, changed(shape=(32, 640)))
        with pytest.raises(ValueError, match=r"holds learners\.scout\.optimizer\.1\.count, which this run has not"):
            checkpoints.restore(3, like._replace(learners={"scout": like.learners["scout"]._replace(optimizer=None)}))
        other = like._replace(learners=like.learners | {"maverick": like.learners["scout"]})
        with pytest.raises(ValueError, match=r"lacks learners\.maverick\.optimizer\.1\.count"):
            checkpoints.restore(3, other)


def test_a_failed_save_surfaces_and_the_one_before_stays(saved, monkeypatch):
    async def full(*_, **__):
        raise OSError(28, "No space left on device")

    with Checkpoints(saved.folder, keep=2) as checkpoints:
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", full)
        with pytest.raises(OSError, match=r"the checkpoint of step 9 in .* was not written: .*No space left"):
            checkpoints.save(9, saved.state, {}, run_record(saved.cfg, HASH))
            checkpoints.close()
        monkeypatch.undo()
    with Checkpoints(saved.folder) as checkpoints:
        assert checkpoints.latest == 3


def frozen_teacher(cfg: RunConfig) -> RunConfig:
    teacher = replace(cfg.learners["scout"], optimizer=None)
    student = replace(cfg.learners["scout"], distillation=Distillation("behemoth"))
    return replace(cfg, learners={"behemoth": teacher, "scout": student})


def test_config_comes_back_from_json(make_run):
    for cfg in (make_run(), frozen_teacher(make_run())):
        assert config_from_json(run_record(cfg, HASH)["config"]) == cfg
    tree = run_record(make_run(), HASH)["config"]
    with pytest.raises(ValueError, match=r"config\.train\.stepz is no field of TrainConfig"):
        config_from_json(tree | {"train": tree["train"] | {"stepz": 1}})
    with pytest.raises(ValueError, match=r"config\.learners is missing"):
        config_from_json({k: v for k, v in tree.items() if k != "learners"})
    # A field that came after it was written had its default.
    before = tree | {"train": {k: v for k, v in tree["train"].items() if k != "checkpoint_keep"}}
    del before["safety"]
    assert config_from_json(before) == make_run()


def test_what_may_change_between_starts(make_run):
    cfg = make_run()
    old = run_record(cfg, HASH)

    def check(new: RunConfig, tokenizer: str = HASH) -> list[str]:
        return check_resumable(old, run_record(new, tokenizer), "runs/test", 3)

    scout: Learner = cfg.learners["scout"]
    assert check(cfg) == []
    longer = replace(cfg, train=replace(cfg.train, steps=99, log_every=7), mesh=MeshConfig(expert=2), out="elsewhere")
    assert check(longer) == ["mesh.expert: 1 -> 2", f"out: {cfg.out} -> elsewhere", "train.log_every: 1 -> 7",
                             "train.steps: 8 -> 99"]  # fmt: skip
    rate = replace(scout, optimizer=OptimizerConfig(learning_rate=1.0, warmup=2), remat="block")
    assert [line.split(":")[0] for line in check(replace(cfg, learners={"scout": rate}))] == [
        "learners.scout.optimizer.learning_rate", "learners.scout.remat"]  # fmt: skip

    for changed, field in (
        (replace(cfg, train=replace(cfg.train, seed=1)), r"train\.seed = 0, not 1"),
        (replace(cfg, train=replace(cfg.train, batch=16)), r"train\.batch = 8, not 16"),
        (replace(cfg, train=replace(cfg.train, seq_len=64)), r"train\.seq_len = 32, not 64"),
        (replace(cfg, data=replace(cfg.data, weights={"odd": 1.0})), r"data\.weights.* = "),
        (replace(cfg, data=replace(cfg.data, sources={"text": "x"})), r"data\.sources"),
        (replace(cfg, learners={"scout": replace(scout, model=replace(scout.model, num_heads=4))}),
         r"learners\.scout\.model\.num_heads = 2, not 4"),
        (replace(cfg, learners={"maverick": scout}), r"learners\.maverick\..* = 'absent'"),
        (frozen_teacher(cfg), r"learners\.behemoth\..* = 'absent'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"runs/test was trained with {field}"):
            check(changed)
    with pytest.raises(ValueError, match=r"with tokenizer 0+, not 1"):
        check(cfg, "1")


def test_a_field_that_came_later_had_its_default(make_run):
    """A run of before a setting was there goes on where that has its default, in a model, a list and whole sections."""
    cfg = make_run()
    cfg = replace(cfg, stages=(Stage(after=2, batch=16),))
    now = run_record(cfg, HASH)
    old = json.loads(json.dumps(now))
    for section in (old["config"]["learners"]["scout"]["model"], old["config"]["stages"][0]):
        del section["router_bias" if "router_bias" in section else "schedule"]
    del old["config"]["safety"], old["config"]["train"]["seed"], old["config"]["learners"]["scout"]["quant"]
    assert check_resumable(old, now, "runs/test", 3) == []

    scout: Learner = cfg.learners["scout"]
    biased = replace(cfg, learners={"scout": replace(scout, model=replace(scout.model, router_bias=True))})
    with pytest.raises(ValueError, match=r"with learners\.scout\.model\.router_bias = False, not True"):
        check_resumable(old, run_record(biased, HASH), "runs/test", 3)
    with pytest.raises(ValueError, match=r"with train\.seed = 0, not 1"):
        check_resumable(old, run_record(replace(cfg, train=replace(cfg.train, seed=1)), HASH), "runs/test", 3)
    old["config"]["learners"]["scout"]["model"]["tilt"] = 2  # a setting that went
    with pytest.raises(ValueError, match=r"with learners\.scout\.model\.tilt = 2, not 'absent'"):
        check_resumable(old, now, "runs/test", 3)
    del old["config"]["learners"]["scout"]["model"]["tilt"], old["config"]["learners"]["scout"]["model"]
    with pytest.raises(ValueError, match=r"with learners\.scout\.model\.\w+ = 'absent'"):
        check_resumable(old, now, "runs/test", 3)  # has no default


def test_every_train_field_is_guarded_or_free():
    """A new field is guarded until it is named as free: this test says which are."""
    guarded = {"batch", "seq_len", "seed", "tiles"}
    free = {name.removeprefix("train.") for name in RESUMABLE if name.startswith("train.")}
    assert free | guarded == {f.name for f in dataclasses.fields(TrainConfig)} and not free & guarded


def test_names_are_those_of_the_tree(saved):
    names = list(named_leaves(saved.state))
    assert names[0] == "step" and "learners.scout.params.blocks.layers.0.attention.wq_DNH" in names
