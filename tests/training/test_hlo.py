"""Collectives of compiled programs: every way of writing groups and trips, and what XLA makes of a real one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from training import hlo
from training.chips import devices
from training.config import MeshConfig
from training.mesh import make_mesh

TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %at = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%at, %constant.1), direction=LT
}

%async (x: bf16[4,8]) -> bf16[2,8] {
  ROOT %scattered = bf16[2,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%add
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %start = ((bf16[4,8]), bf16[2,8]) async-start(%y), calls=%async
  %done = bf16[2,8] async-done(%start), calls=%async
  ROOT %out = (s32[], f32[8,4]) tuple(%at, %z)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]) while(%p), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %whole = f32[8,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %out = (s32[], f32[8,4]) tuple(%at, %whole)
}

%left (x: f32[16]) -> f32[16] {
  ROOT %sent = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
}

%right (x: f32[16]) -> f32[16] {
  ROOT %same = f32[16]{0} copy(%x)
}

ENTRY %main (x: f32[2,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body
  %either = f32[16] conditional(%p, %x, %x), true_computation=%left, false_computation=%right
  %third = f32[16] conditional(%n, %x, %x), branch_computations={%left, %right}
  %all = (f32[4]{0}, /*index=1*/f32[6]{0}) all-reduce(%u, %v), replica_groups=[1,8]<=[8], to_apply=%add
  %gathered = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%w), replica_groups=[4,2]<=[8], dimensions={0}
  %alone = f32[4]{0} all-reduce(%w), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %r = f32[8,4] get-tuple-element(%loop), index=1
}
"""


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=2, expert=2, context=2), devices("h100:1x8"))


def test_groups_and_trips_by_hand(mesh):
    """Devices 0-3 share a place on `fsdp`, pairs of neighbours differ on `context`; the outer loop runs 12 times."""
    found = {(one.kind, one.dtype): one for one in hlo.collectives(TEXT, mesh)}
    assert found.keys() == {("all_gather", "float32"), ("reduce_scatter", "bfloat16"), ("ppermute", "float32"),
                            ("all_reduce", "float32"), ("all_gather", "bfloat16")}  # fmt: skip
    whole = found["all_gather", "float32"]
    assert whole == ("all_gather", ("expert", "context"), "float32", 12, 12 * 8 * 4, 12 * 3 * 8 * 4)
    scattered = found["reduce_scatter", "bfloat16"]
    assert scattered == ("reduce_scatter", ("fsdp",), "bfloat16", 36, 36 * 4 * 8 * 2, 36 * 4 * 8 * 2 / 2)
    assert found["ppermute", "float32"] == ("ppermute", ("context",), "float32", 2, 128, 128)
    assert found["all_reduce", "float32"][:5] == ("all_reduce", ("fsdp", "expert", "context"), "float32", 1, 40)
    assert found["all_gather", "bfloat16"] == ("all_gather", ("context",), "bfloat16", 1, 8, 8)
    wires = [one.wire for one in hlo.collectives(TEXT, mesh)]
    assert wires == sorted(wires, reverse=True)


def test_axes_written_by_name(mesh):
    """As Shardy writes groups: the mesh's axes are in its order, however they are called."""
    groups = "replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2,'axis_3'=2,'axis_4'=1] {'axis_2','axis_3'}"
    assert hlo._group(f"all-reduce(%x), {groups}, to_apply=%add", mesh) == [0, 1, 2, 3]
    assert hlo._axes([0, 1, 2, 3], mesh) == ("expert", "context")


def test_a_real_program(mesh):
    """Of a scan in a shard_map: five gathers over one axis and a sum over two, however XLA arranges them."""
    real = make_mesh(MeshConfig(fsdp=2, expert=2, context=2), jax.devices()[:8])

    def local(x, w):
        def body(x, _):
            return jnp.tanh(x @ jax.lax.all_gather(w * x.sum(), "fsdp", tiled=True)), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.psum(x, ("expert", "context"))

    step = jax.shard_map(local, mesh=real, in_specs=(P(), P("fsdp")), out_specs=P(), check_vma=False)
    text = jax.jit(step).lower(jnp.ones((4, 16)), jnp.ones((16, 16))).compile().as_text()
    found = {(one.kind, one.axes): one for one in hlo.collectives(text, real)}
    gathered, summed = found["all_gather", ("fsdp",)], found["all_reduce", ("expert", "context")]
    assert (gathered.calls, gathered.operand, gathered.wire) == (5, 5 * 8 * 16 * 4, 5 * 8 * 16 * 4)
    assert (summed.calls, summed.operand) == (1, 4 * 16 * 4)
    assert hlo.collectives("", real) == []
