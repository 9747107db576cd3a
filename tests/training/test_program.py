"""Trips of small programs, and every byte that a small model's step sends, by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import tiny_scout
from training.chips import devices
from training.config import Learner, MeshConfig, RunConfig, TrainConfig
from training.hlo import sends
from training.mesh import make_mesh
from training.program import Equation, count, matmul_flops, walk
from training.weighting import DOMAINS

SQUARE = jnp.ones((4, 4))


def flops(f, weigh=lambda scope: None) -> float:
    return sum(one.trips * matmul_flops(one.eqn) for one in walk(jax.make_jaxpr(f)(SQUARE).jaxpr, weigh))


def times(n: int, f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=n)[0]


ONE = 2 * 4**3


def test_loops_multiply():
    assert flops(lambda x: x @ x) == ONE
    assert flops(times(3, times(5, lambda x: x @ x))) == 15 * ONE
    assert flops(lambda x: times(3, jax.jit(times(5, lambda x: x @ x)))(x) @ x) == 16 * ONE
    jaxpr = jax.make_jaxpr(times(3, times(5, lambda x: x @ x)))(SQUARE).jaxpr
    assert sum(matmul_flops(one.eqn) for one in walk(jaxpr)) == ONE  # what a count of bodies would say


def test_what_is_computed_again_is_marked():
    def loss(x):
        return jnp.sum(times(3, jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x)))(x))

    found = [one for one in walk(jax.make_jaxpr(jax.grad(loss))(SQUARE).jaxpr) if matmul_flops(one.eqn)]
    again = [one for one in found if "rematted_computation" in one.scope]
    forward = [one for one in found if not one.backward]
    assert {one.trips for one in found} == {3} and all(one.backward for one in again)
    assert (len(forward), len(again), len(found)) == (2, 2, 8)


def test_branches_are_weighed_or_unknown():
    def f(x):
        with jax.named_scope("choice"):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert math.isnan(flops(times(4, f)))
    assert flops(times(4, f), {("choice",): (0.75, 0.25)}.get) == 4 * (0.75 * 2 + 0.25) * ONE
    assert flops(times(4, f), {("choice",): (0.0, 1.0)}.get) == 4 * ONE


def test_open_loops_are_unknown():
    assert math.isnan(flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)))


def test_ragged_products():
    x, w, sizes = jnp.ones((6, 4)), jnp.ones((2, 4, 8)), jnp.array([2, 4])

    def loss(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    found = [matmul_flops(one.eqn) for one in walk(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w).jaxpr)]
    assert [n for n in found if n] == [2 * 6 * 4 * 8] * 3


def test_what_a_ring_sends():
    """Bytes that leave a device for each that goes in, checked against passing shards around."""
    for n in (2, 3, 8):
        shard, whole = 1, n
        assert sends("all_gather", n) * shard == n - 1
        assert sends("reduce_scatter", n) * whole == pytest.approx(n - 1)
        assert sends("all_reduce", n) * whole == pytest.approx(2 * (n - 1))
        assert sends("all_to_all", n) * whole == sends("ragged_all_to_all", n) * whole == pytest.approx(n - 1)
    assert sends("ppermute", 3, [(0, 2), (1, 1), (2, 0)]) == 1
    assert sends("ppermute", 1, [(0, 0)]) == 0


# --------------------------------------------------------------------------------- two layers, one local, one global

D, N, K, H, F, E, V, T, CHUNK, ROWS = 32, 4, 2, 8, 64, 4, 64, 64, 16, 8
MODEL = replace(
    tiny_scout(), embed_dim=D, num_layers=2, nope_every=2, num_heads=N, num_kv_heads=K, head_dim=H, expert_dim=F,
    num_experts=E, vocab_size=V, chunk=CHUNK,
)  # fmt: skip
MESH = MeshConfig(fsdp=2, expert=2, context=2, tensor=2)
STORED, BF16, FP32, IDS = ("fsdp", "expert", "context"), "bfloat16", "float32", "int32"


def program(mesh: MeshConfig = MESH, **how):
    train = TrainConfig(batch=ROWS, seq_len=T)
    cfg = RunConfig("small", {"model": Learner(MODEL, **{"remat": "none"} | how)}, mesh=mesh, train=train)
    return count(cfg, make_mesh(mesh, devices("v5p:4x2x2")))


def operands(dispatch: str, exchange: str) -> dict[tuple, float]:
    """Bytes that go into the collectives of one device in a step, by kind, axes and dtype."""
    found: dict[tuple, float] = defaultdict(float)
    rows, tokens, layers, axes = ROWS // 4, T // 2, 2, 8  # of a device; the mesh's size but for tensor

    # Weights of one device's part over tensor: gathered in bf16 (the router in fp32), gradients scattered in fp32.
    attention, shared, experts = 2 * D * (N + K) * H // 2, 3 * D * F // 2, 3 * E * D * F // 2
    vectors, router = D * (2 * layers + 1), layers * D * E
    whole, tables = layers * (attention + shared) + vectors, 2 * V * D // 2 // 2
    found["all_gather", STORED, BF16] += 2 * whole / axes
    found["all_gather", STORED, FP32] += 4 * router / axes
    found["reduce_scatter", STORED, FP32] += 4 * (whole + router)
    found["all_reduce", ("tensor",), FP32] += 4 * (vectors + router) / axes  # those that tensor does not split

    # Experts: all gathered, over one dimension after the other; or those of an expert shard.
    rest = ("fsdp", "context")
    found["all_gather", rest, BF16] += 2 * tables / 4  # whose vocabulary stays split over expert
    found["reduce_scatter", rest, FP32] += 4 * tables
    if dispatch == "fsdp":
        found["all_gather", ("expert",), BF16] += layers * 2 * experts / 8
        found["all_gather", rest, BF16] += layers * 2 * experts / 4
        found["reduce_scatter", rest, FP32] += layers * 4 * experts
        found["reduce_scatter", ("expert",), FP32] += layers * 4 * experts / 4
    else:
        found["all_gather", rest, BF16] += layers * 2 * experts / 2 / 4
        found["reduce_scatter", rest, FP32] += layers * 4 * experts / 2
        room = 24  # 1.25 x 64 pairs / 4 experts = 20, in eights
        found["all_to_all", ("expert",), BF16] += layers * 4 * 2 * (E * room * D)  # there and back, twice

    # Activations: summed over tensor after attention and after the ffn, and after the embedding; and all of it back.
    found["all_reduce", ("tensor",), BF16] += 2 * (2 * layers + 1) * 2 * (rows * tokens * D)

    # The vocabulary's columns: ids, labels, weights and hidden states of all along expert come to them, looked-up rows
    # go back, and the gradients of both the other way.
    found["all_gather", ("expert",), IDS] += 2 * 4 * (rows * tokens)
    found["all_gather", ("expert",), FP32] += 4 * (rows * tokens)
    found["all_gather", ("expert",), BF16] += 2 * 2 * (rows * tokens * D)
    found["reduce_scatter", ("expert",), BF16] += 2 * 2 * 2 * (rows * tokens * D)
    found["all_reduce", ("tensor", "expert"), FP32] += 3 * 4 * 2 * (rows * tokens)  # top and sum, label's logit

    # The one global layer: keys, values and segment ids; with mirror half of the queries and of what they found.
    context, keys, half = ("context",), 2 * rows * tokens * (K // 2) * H, 2 * rows * (tokens // 2) * (N // 2) * H
    found["all_gather", context, BF16] += 2 * keys
    found["all_gather", context, IDS] += 4 * rows * tokens
    found["reduce_scatter", context, BF16] += 2 * 2 * keys
    if exchange == "mirror":
        found["ppermute", context, BF16] += 2 * 2 * half
        found["ppermute", context, IDS] += 4 * (tokens // 2) * (1 + rows)  # positions of a row, segments of all

    # Statistics: load, probability, z, tokens and drops of layers, tokens of the batch, two of its one domain; back,
    # probability and z.
    found["all_reduce", STORED, FP32] += 4 * (layers * (2 * E + 3) + 1 + 2) + 4 * layers * (E + 1)
    return found


@pytest.mark.parametrize("dispatch", ["fsdp", "all_to_all"])
@pytest.mark.parametrize("exchange", ["gather", "mirror"])
def test_bytes_of_two_layers(dispatch, exchange):
    found: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for one in program(dispatch=dispatch, exchange=exchange).collectives:
        found[one.kind, one.axes, one.dtype] += (one.operand, one.wire)
    want = operands(dispatch, exchange)
    assert {key: operand for key, (operand, _) in found.items()} == want
    for (kind, axes, _), (operand, wire) in found.items():
        n = 2 ** len(axes)
        ring = {"all_gather": n - 1, "all_reduce": 2 * (n - 1) / n, "ppermute": 1}.get(kind, (n - 1) / n)
        assert wire == pytest.approx(ring * operand)


def test_microbatches_repeat_what_crosses_but_the_sums_of_gradients():
    one, two = (program(MeshConfig(replica=2, fsdp=2, context=2, tensor=2), microbatches=n).collectives for n in (1, 2))

    def sent(collectives, kind, axes):
        return sum(x.operand for x in collectives if (x.kind, x.axes) == (kind, axes))

    assert sent(two, "all_gather", ("fsdp", "context")) == 2 * sent(one, "all_gather", ("fsdp", "context")) > 0
    assert sent(two, "all_reduce", ("replica",)) == sent(one, "all_reduce", ("replica",)) > 0


def test_one_device_sends_nothing_and_multiplies_as_much():
    alone = count(
        RunConfig("alone", {"model": Learner(MODEL, remat="none")}, train=TrainConfig(batch=ROWS, seq_len=T)),
        make_mesh(MeshConfig(), devices("v5p:1x1x1")),
    )
    shared = program()
    assert alone.collectives == ()
    parts = {part: work.once for (_, part), work in alone.flops.items()}
    parts["router"] *= 2  # not split over tensor
    assert {part: 16 * work.once for (_, part), work in shared.flops.items()} == pytest.approx(parts)


@pytest.mark.parametrize("remat", ["nested", "layer"])
def test_a_loop_over_both_kinds_of_layers_is_weighed_by_its_layers(remat):
    """As one loop (these) and as layers by themselves: the same work, and the same keys and values sent."""
    loop, apart = program(remat=remat), program(remat="none")
    assert {of: work.once for of, work in loop.flops.items()} == pytest.approx(
        {of: work.once for of, work in apart.flops.items()}
    )
    scattered = [
        [x.operand for x in p.collectives if (x.kind, x.dtype) == ("reduce_scatter", BF16)] for p in (loop, apart)
    ]
    assert scattered[0] == scattered[1] != []


def test_kernels_whose_work_is_not_known_are_refused(monkeypatch):
    monkeypatch.setattr("training.program.local_share", lambda cfg, scope: None)
    with pytest.raises(ValueError, match="trips are not known"):
        program(remat="nested")


def test_hbm_traffic():
    """State: fp32 weights and two moments, read and written, and the gradient written and read."""
    found = program()
    weights = 2 * (2 * D * (N + K) * H + 3 * D * F + 3 * E * D * F + D * E + 2 * D) + D + 2 * V * D
    vectors = 2 * D * E + D * 5  # whole on both devices of the tensor axis
    shard = (weights - vectors) / 16 + vectors / 8
    counts = 2 * 4 * 2 + 2 * 4 * (7 * DOMAINS + 3)  # optax's two counters, and the means that weigh targets
    assert found.hbm["state"] == pytest.approx(4 * (2 * 3 + 2) * shard + counts, rel=1e-3)
    assert found.hbm["matmuls"] > found.hbm["state"]


def test_axes_of_an_equation():
    mesh = make_mesh(MeshConfig(fsdp=-1))
    spec = jax.sharding.PartitionSpec("fsdp")
    f = jax.shard_map(
        lambda x: jax.lax.psum(x, ("fsdp", "tensor")), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    (one,) = [one for one in walk(jax.make_jaxpr(f)(jnp.ones(8)).jaxpr) if one.axes]
    assert isinstance(one, Equation) and (one.name, one.axes, one.local) == ("psum", ("fsdp", "tensor"), True)
