"""Devices that stand in for absent ones, and times by hand from their data sheets."""

from __future__ import annotations

import pytest

from llama4_jax.config import scout
from training.chips import CHIPS, chip_of, devices, peak_flops
from training.config import Learner, MeshConfig, RunConfig, TrainConfig
from training.mesh import make_mesh
from training.program import Collective, Flops, Program, count
from training.roofline import roofline, seconds_of

GB = 1e9


@pytest.mark.parametrize("name, slices, number", [
    ("v5p:4x4x8", 1, 128), ("v5p:4x4x8", 2, 256), ("v5e:16x16", 1, 256), ("tpu7x:4x4x4", 1, 128), ("h100:16x8", 1, 128),
    ("h200:2x8", 1, 16), ("h200:1x4", 1, 4),
])  # fmt: skip
def test_stand_ins_make_a_mesh(name, slices, number):
    found = devices(name, slices)
    assert len({device.id for device in found}) == len(found) == number
    assert len({(x.coords, x.core_on_chip, x.slice_index) for x in found}) == number
    mesh = make_mesh(MeshConfig(replica=slices, fsdp=-1, tensor=4), found)
    assert mesh.size == number and chip_of(found[0].device_kind) is CHIPS[name.split(":")[0]]
    hosts = {x.process_index for x in found}
    assert len(hosts) == -(-number // CHIPS[name.split(":")[0]].devices // CHIPS[name.split(":")[0]].host)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:4x4", "v5e:4x4x4", "h100:8x4", "h100:1x3", "h100:64", "v9:4x4", "v5p:0x4x4"]
)
def test_what_is_no_device(name):
    with pytest.raises(ValueError, match=r"no devices .*v5p:4x4x4.*h100:HOSTSx8"):
        devices(name)


def test_sheets_by_the_kind_that_jax_names():
    assert chip_of("TPU v5 lite") is chip_of("TPU v5e") is CHIPS["v5e"]
    assert chip_of("TPU v5") is chip_of("TPU v5p") is CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("NVIDIA H200") is CHIPS["h200"]
    assert chip_of("NVIDIA H100 PCIe") is chip_of("NVIDIA H200 NVL") is chip_of("cpu") is None
    assert peak_flops("TPU7x") == 2307e12 / 2  # of a device, half a chip


def one(kind: str, *axes: str) -> Collective:
    return Collective(kind, axes, "float32", "", "", 1.0, 0.0, wire=600 * GB)


@pytest.mark.parametrize("name, slices, sizes, what, network, seconds", [
    # 4 x 4 x 8: the whole torus has three rings, six links of 100 GB/s; an axis of 8 one ring, of 4 another.
    ("v5p:4x4x8", 1, dict(fsdp=128), one("all_gather", "fsdp"), "ici", 1.0),
    ("v5p:4x4x8", 1, dict(fsdp=16, tensor=8), one("all_gather", "tensor"), "ici", 3.0),
    ("v5p:4x4x8", 1, dict(fsdp=16, tensor=8), one("all_gather", "fsdp"), "ici", 1.5),
    ("v5p:4x4x8", 1, dict(fsdp=16, tensor=8), one("all_to_all", "tensor"), "ici", 8 / 8 * 6),  # 8 devices, cut twice
    ("v5p:4x4x8", 1, dict(fsdp=16, tensor=8), one("ppermute", "tensor"), "ici", 2 * 8 / 8 * 6),
    ("v5p:2x2x4", 1, dict(fsdp=4, tensor=4), one("all_gather", "fsdp"), "ici", 3.0),  # two lines of two, no ring
    ("tpu7x:4x4x4", 1, dict(fsdp=128), one("all_gather", "fsdp"), "ici", 2.0),  # two devices to a chip
    ("v5e:16x16", 1, dict(fsdp=256), one("all_gather", "fsdp"), "ici", 3.0),  # two rings of 50 GB/s
    ("v5e:8x8", 1, dict(fsdp=64), one("all_gather", "fsdp"), "ici", 6.0),  # two lines
    # Between slices each chip has 6.25 GB/s.
    ("v5p:4x4x4", 2, dict(replica=2, fsdp=64), one("all_reduce", "replica"), "dcn", 96.0),
    ("v5p:4x4x4", 2, dict(replica=2, fsdp=64), one("all_gather", "fsdp"), "ici", 1.0),
    # 450 GB/s within a host, 50 GB/s a GPU between hosts; a ring through all of a host's GPUs uses all its adapters.
    ("h100:8x8", 1, dict(fsdp=8, expert=8), one("all_to_all", "expert"), "nvlink", 600 / 450),
    ("h100:8x8", 1, dict(fsdp=8, expert=8), one("all_gather", "fsdp"), "network", 12.0),
    ("h100:8x8", 1, dict(fsdp=8, expert=8), one("all_gather", "fsdp", "expert"), "network", 1.5),
    ("h100:8x8", 1, dict(fsdp=64), one("all_to_all", "fsdp"), "network", 12 * 56 / 63),
])  # fmt: skip
def test_time_on_a_network(name, slices, sizes, what, network, seconds):
    found = devices(name, slices)
    mesh = make_mesh(MeshConfig(**sizes), found)
    assert seconds_of(what, chip_of(found[0].device_kind), mesh) == (network, pytest.approx(seconds))


def test_the_slowest_resource_is_the_step():
    mesh = make_mesh(MeshConfig(), devices("h100:1x8"))
    nothing = dict(devices=8, tokens=1000, model_flops=8 * 989e12, collectives=(), hbm={})
    computing = Program(**nothing | dict(flops={("a", "b"): Flops(1.5 * 989e12, 0.5 * 989e12)}))
    found = roofline(computing, mesh)
    assert (found.bound, found.step, found.tokens_per_second, found.mfu) == ("compute", 2.0, 500.0, 0.5)
    assert roofline(computing, mesh, efficiency=0.5).step == 4.0
    reading = roofline(Program(**nothing | dict(flops={}, hbm=dict(state=3350 * GB * 5))), mesh)
    assert (reading.bound, reading.step) == ("hbm", 5.0)
    assert reading.assumed["hbm_rate"] == 3350 * GB and reading.assumed["efficiency"] == 1.0


def test_a_step_of_scout():
    """At 8K on 128 chips everything is there, and no less than its model FLOPs at the peak."""
    train = TrainConfig(batch=1024, seq_len=8192)
    cfg = RunConfig("scout", {"scout": Learner(scout(), remat="nested")}, train=train)
    mesh = make_mesh(cfg.mesh, devices("v5p:4x4x8"))
    found = roofline(count(cfg, mesh), mesh)
    assert set(found.seconds) == {"compute", "hbm", "ici"} and found.bound == "compute"
    assert found.step > cfg.train.batch * 8192 * 108.9e9 / 128 / 459e12
    assert 0.5 < found.mfu < 3 / 4  # recomputing alone takes a fourth at least
