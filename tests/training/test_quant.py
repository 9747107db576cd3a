"""A step in eight bits: which of its matmuls they are, that a mesh keeps its losses, and where it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from llama4_jax.config import tiny_scout
from llama4_jax.quant import check_device
from training.bench import synthetic_batches
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.loop import put_local
from training.mesh import make_mesh
from training.state import create_state, execution
from training.step import make_train_step

V, STEPS, KINDS = 160, 4, ("fp8", "int8")
MODEL = replace(tiny_scout(), vocab_size=V, chunk=16, embed_dim=32, head_dim=16, expert_dim=48, floor_scale=8)
E4M3, E5M2, INT8 = (jnp.dtype(t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8))


def run_config(**how) -> RunConfig:
    learner = Learner(MODEL, OptimizerConfig(learning_rate=1e-2, warmup=1), **(dict(remat="none") | how))
    return RunConfig("test", {"scout": learner}, train=TrainConfig(steps=STEPS, batch=8, seq_len=64))


def equations(jaxpr: core.Jaxpr, scope: str = "") -> Iterator[tuple[Any, str]]:
    """Every equation with the names of the scopes around it, those within loops and calls once."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        yield eqn, here
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from equations(inner, here)


def matmuls(**how) -> list[tuple[tuple, str]]:
    """(the operands' dtypes, scope) of each matmul of a training step."""
    cfg, mesh = run_config(**how), make_mesh(MeshConfig(), jax.devices()[:1])
    batch = put_local(synthetic_batches(cfg, count=1)[0], mesh)
    state = jax.eval_shape(lambda: create_state(cfg, mesh))
    jaxpr = jax.make_jaxpr(make_train_step(cfg, mesh, domains=1))(state, batch)
    return [
        (tuple(jnp.dtype(x.aval.dtype) for x in eqn.invars), scope)
        for eqn, scope in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize(
    "dispatch",
    ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all_to_all", "ragged_all_to_all"))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_which_matmuls_have_eight_bits(kind, dispatch):
    """Of a layer's: q with k and v, output, and two each of expert and shared expert (gate with up, and down), forward
    and twice backward."""
    found, plain = matmuls(quant=kind, dispatch=dispatch), matmuls(dispatch=dispatch)
    small = [(types, scope) for types, scope in found if {E4M3, E5M2, INT8} & set(types)]
    each = MODEL.num_layers * (2 + 2 + 2)
    pairs = Counter(frozenset(types) for types, _ in small)
    assert pairs == ({frozenset([INT8]): 3 * each} if kind == "int8" else
                     {frozenset([E4M3]): each, frozenset([E4M3, E5M2]): 2 * each})  # fmt: skip
    where = Counter(name for _, scope in small for name in ("router", "attention_", "shared_expert", "experts", "fetch",
                                                            "embedding", "norm") if name in scope)  # fmt: skip
    assert where == dict(shared_expert=6 * MODEL.num_layers, experts=6 * MODEL.num_layers)
    # All others are as they were: the router in fp32, scores and values of attention, the head.
    others = [(types, scope) for types, scope in found if not {E4M3, E5M2, INT8} & set(types)]
    assert len(found) == len(plain) and not any({E4M3, E5M2, INT8} & set(types) for types, _ in plain)
    assert sum("router" in scope for _, scope in others) == 3 * MODEL.num_layers
    assert all(set(types) == {jnp.dtype("float32")} for types, scope in others if "router" in scope)
    assert sum("attention_" in scope for _, scope in others) == sum("attention_" in scope for _, scope in plain) > 0
    kept = Counter(types for types, scope in plain if "experts" not in scope and "shared" not in scope)
    kept[(jnp.dtype("bfloat16"),) * 2] -= 6 * MODEL.num_layers  # attention's projections
    assert Counter(types for types, _ in others) == kept


def losses(mesh_cfg: MeshConfig, devices: int, **how) -> np.ndarray:
    cfg, mesh = run_config(compute_dtype="float32", **how), make_mesh(mesh_cfg, jax.devices()[:devices])
    state, step, out = create_state(cfg, mesh), make_train_step(cfg, mesh, domains=1), []
    for batch in synthetic_batches(cfg, count=1) * STEPS:
        state, metrics = step(state, put_local(batch, mesh))
        sums = metrics["scout"]["sums"]
        out.append(sums.by_domain["ce"].sum() / sums.tokens)
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_gives_the_losses_of_one_device_but_for_rounding(kind):
    alone, plain = losses(MeshConfig(), 1, quant=kind), losses(MeshConfig(), 1)
    assert alone[0] - alone[-1] > 0.1  # it learns, so later steps depend on the gradients
    np.testing.assert_allclose(alone, plain, rtol=1e-2)
    assert np.abs(alone - plain).max() > 1e-5  # and is quantised
    got = losses(MeshConfig(fsdp=2, expert=2, tensor=2), 8, quant=kind)
    np.testing.assert_allclose(got, alone, rtol=5e-3)
    got = losses(MeshConfig(fsdp=1, expert=2, context=2), 4, quant=kind, dispatch="all_to_all", capacity=8.0)
    np.testing.assert_allclose(got, alone, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["layer", "nested"])
def test_what_is_recomputed_is_quantised_alike(remat):
    alone = losses(MeshConfig(), 1, quant="fp8")
    np.testing.assert_allclose(losses(MeshConfig(), 1, quant="fp8", remat=remat), alone, rtol=1e-3)


def device(kind: str, platform: str) -> Any:
    return SimpleNamespace(device_kind=kind, platform=platform)


@pytest.mark.parametrize("kind, quant, choice", [
    ("TPU v5p", "fp8", "use none and int8"), ("TPU v6 lite", "fp8", "use none and int8"),
    ("TPU7x", "int8", "use none and fp8"), ("NVIDIA H100 80GB HBM3", "int8", "use none and fp8"),
    ("NVIDIA A100-SXM4-80GB", "fp8", "use none"), ("TPU v4", "int8", "use none"),
])  # fmt: skip
def test_a_device_without_the_type_is_refused_with_what_it_has(kind, quant, choice):
    platform = "tpu" if "TPU" in kind else "gpu"
    with pytest.raises(ValueError, match=f"^quant {quant} is for .*; this is a {kind}: {choice}$"):
        check_device(quant, device(kind, platform))
    check_device("none", device(kind, platform))


def test_devices_with_the_type_are_taken_and_a_cpu_emulates_both():
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "TPU7x"):
        check_device("fp8", device(kind, "gpu"))
    for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite"):
        check_device("int8", device(kind, "tpu"))
    for quant in KINDS:
        check_device(quant, jax.devices("cpu")[0])


def test_what_a_learner_cannot_have_is_refused_before_it_starts():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    learner = run_config(quant="fp8", grouped_matmul="megablox").learners["scout"]
    with pytest.raises(ValueError, match="quant fp8 cannot go through grouped_matmul megablox"):
        execution(learner, mesh)
    assert execution(replace(learner, grouped_matmul="auto"), mesh).quant == "fp8"
