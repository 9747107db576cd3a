"""Where devices lie: the order of one slice, and of several only replicas across."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from data.batch import FIELDS, Batch
from llama4_jax.axes import MESH_AXES, REPLICA
from llama4_jax.config import tiny_scout
from training.chips import Device, devices
from training.config import Learner, MeshConfig
from training.mesh import make_mesh, row_share
from training.program import walk
from training.state import abstract_state, execution
from training.step import gradient


def chips(slices: int, torus: tuple[int, int, int] = (2, 2, 4), platform: str = "tpu") -> list[Device]:
    """The devices of some slices, shuffled."""
    found = [replace(x, platform=platform) for x in devices("v5p:" + "x".join(map(str, torus)), slices)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.mark.parametrize("sizes", [
    dict(fsdp=16), dict(fsdp=4, expert=4), dict(fsdp=2, expert=2, context=2, tensor=2), dict(context=8, fsdp=2),
])  # fmt: skip
@pytest.mark.parametrize("slices, replicas", [(2, 2), (3, 3), (2, 4)])
def test_only_replicas_lie_across_slices(slices, replicas, sizes):
    sizes = {**sizes, "fsdp": sizes["fsdp"] * slices // replicas}
    grid = make_mesh(MeshConfig(replica=replicas, **sizes), chips(slices)).devices
    assert grid.shape == (replicas, *(sizes.get(name, 1) for name in MESH_AXES[1:]))
    assert len({chip.id for chip in grid.flat}) == 16 * slices
    for r, replica in enumerate(grid):
        assert {chip.slice_index for chip in replica.flat} == {r // (replicas // slices)}


def test_a_slice_follows_its_torus():
    """Neighbours along the axes that talk most are neighbours in the torus, whatever order the devices come in."""
    grid = make_mesh(MeshConfig(fsdp=4, expert=2, tensor=2), chips(1)).devices
    for axis in (MESH_AXES.index("expert"), MESH_AXES.index("tensor")):
        first, second = np.moveaxis(grid, axis, 0).reshape(2, -1)
        for a, b in zip(first, second, strict=True):
            assert sum(abs(i - j) for i, j in zip(a.coords, b.coords, strict=True)) == 1
    split = make_mesh(
        MeshConfig(fsdp=8, tensor=2), chips(1, (4, 4, 1))
    ).devices  # no axis of the torus has 2 or 8 chips
    assert split.shape == (1, 8, 1, 1, 2)


@pytest.mark.parametrize("replicas, nearest", [(1, 3), (2, 3), (4, 3), (5, 6), (-1, 3)])
def test_replicas_that_would_cross_a_slice_are_refused(replicas, nearest):
    fsdp = 48 // 4 if replicas == -1 else -1
    with pytest.raises(ValueError, match=rf"must be a multiple of the 3 slices.*: the nearest is {nearest}$"):
        make_mesh(MeshConfig(replica=replicas, fsdp=fsdp), chips(3))


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_processes_of_other_devices_are_no_slices(platform):
    devices = sorted(chips(2, platform=platform), key=lambda chip: chip.id)
    grid = make_mesh(MeshConfig(fsdp=8, context=4), devices).devices
    assert [chip.id for chip in grid.flat] == list(range(32))


def test_cpu_devices_stay_in_order():
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2))
    assert mesh.axis_names == MESH_AXES and dict(mesh.shape) == dict(zip(MESH_AXES, (1, 4, 1, 1, 2), strict=True))
    assert list(mesh.devices.flat) == jax.devices()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        (dict(fsdp=16), [(0, 4), (1, 4), (2, 4), (3, 4)]),  # each of four processes has four devices
        (dict(fsdp=4, context=4), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (dict(fsdp=2, context=8), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two share a row
        (dict(fsdp=1, context=8, tensor=2), [(0, 1)] * 4),
    ],
)
def test_processes_read_the_rows_that_their_devices_need(sizes, parts):
    devices = sorted(chips(1, platform="cpu"), key=lambda chip: chip.id)
    mesh = make_mesh(MeshConfig(**sizes), devices)
    shares = [row_share(mesh, process) for process in range(4)]
    assert sorted({place for share in shares for place in share.places}) == list(range(sizes["fsdp"]))
    assert [share[:2] for share in shares] == parts


def test_rows_that_cannot_be_dealt_out_by_process_are_refused():
    devices = sorted(chips(1, (3, 1, 4), platform="cpu"), key=lambda chip: chip.id)  # three processes of four
    mesh = make_mesh(MeshConfig(fsdp=2, context=6), devices)
    with pytest.raises(ValueError, match=r"mesh.context x mesh.tensor \(6\) must divide the devices of a process"):
        row_share(mesh, 0)


def test_a_gradient_crosses_slices_once_and_as_a_shard(make_run):
    """Over `replica` goes one sum of each weight's gradient, after its microbatches and of what fsdp leaves of it.

    All else are statistics of tokens and experts, of a few numbers a layer.
    """
    cfg = make_run()
    learner = replace(cfg.learners["scout"], microbatches=2)
    mesh = make_mesh(MeshConfig(replica=2, fsdp=4))
    params = abstract_state(cfg, mesh).learners["scout"].params
    rows = jax.ShapeDtypeStruct((16, cfg.train.seq_len), np.int32)
    batch = Batch(*[rows] * len(FIELDS))._replace(loss_mask=jax.ShapeDtypeStruct(rows.shape, np.float32))
    jaxpr = jax.make_jaxpr(gradient(learner, mesh, 2))(params, batch).jaxpr
    crossing = [one for one in walk(jaxpr) if REPLICA in one.axes]
    assert {one.name for one in crossing} == {"psum"}
    operands = [(x.aval.shape, one.axes, one.trips) for one in crossing for x in one.eqn.invars]
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    assert sorted(shape for shape, axes, _ in operands if axes == (REPLICA,)) == sorted(shards)
    assert {trips for _, axes, trips in operands if axes == (REPLICA,)} == {1}
    experts = cfg.learners["scout"].model.num_experts * cfg.learners["scout"].model.num_layers
    assert all(np.prod(shape) <= experts for shape, axes, _ in operands if axes != (REPLICA,))


@pytest.mark.parametrize(
    ("how", "attention"),
    [
        (dict(), "mosaic_gpu"),
        (dict(compute_dtype="float32"), "blockwise"),
        (dict(model=replace(tiny_scout(), head_dim=192)), "blockwise"),
        (dict(compute_dtype="float32", attention="mosaic_gpu"), "mosaic_gpu"),  # which then says what it takes
    ],
)
def test_gpus_attend_by_the_fastest_kernel_that_takes_such_numbers(how, attention):
    learner = Learner(**(dict(model=tiny_scout()) | how))
    assert execution(learner, make_mesh(MeshConfig(), devices("h100:1x1"))).attention == attention
