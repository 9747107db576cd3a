"""What a run needs and how fast it can be, without its devices: memory, FLOPs, traffic, the least time of a step.

`plan(cfg, topology)` compiles the run's real step ahead of time and counts it in its jaxpr; with `fast` both are
formulas (`training/memory.py`, `training/estimate.py`). `search` ranks meshes, remat policies and microbatches so.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from llama4_jax.axes import MESH_AXES
from training import ahead, chips
from training.config import Learner, MeshConfig, RunConfig
from training.estimate import estimate_program
from training.memory import Memory, estimate
from training.mesh import check_fits, make_mesh
from training.program import Program, count
from training.roofline import Roofline, roofline
from training.state import abstract_state, execution

ROOM = 0.92
"""Of HBM, what a program is let take: compilers and networks keep some for themselves (untuned)."""


def plan(
    cfg: RunConfig, topology: str, fast: bool = False, log: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """The plan as plain data; seconds, bytes and FLOPs of one device unless it says otherwise.

    ValueError, in a line, for a topology or a mesh that cannot be.
    """
    stand_ins = chips.devices(topology)
    mesh = make_mesh(cfg.mesh, stand_ins)
    check_fits(cfg, mesh)
    state = abstract_state(cfg, mesh)
    memory = estimate(cfg, mesh, state)
    if fast:
        program, cost = estimate_program(cfg, mesh, state), None
    else:
        ahead.check_compiler(topology)
        log("counting the step in its jaxpr")
        program = count(cfg, mesh)
        log("compiling the step")
        ahead.no_device_needed()
        _, cost = ahead.compile_step(cfg, make_mesh(cfg.mesh, ahead.devices_of(topology)))
    return _described(cfg, topology, mesh, memory, program, cost)


def _described(
    cfg: RunConfig, topology: str, mesh: Mesh, memory: Memory, program: Program, cost: ahead.Cost | None
) -> dict[str, Any]:
    chip = chips.CHIPS[topology.partition(":")[0]]
    hbm = chip.hbm / chip.devices
    peak = cost.peak if cost and cost.peak else memory.peak
    roof = roofline(program, mesh)
    out: dict[str, Any] = dict(
        preset=cfg.name,
        topology=topology,
        devices=mesh.size,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        batch=cfg.train.batch,
        seq_len=cfg.train.seq_len,
        learners={name: _how(learner, mesh) for name, learner in cfg.learners.items()},
        memory=dict(
            hbm=hbm, fits=peak <= ROOM * hbm, peak=peak, state=memory.state, batch=memory.batch,
            arguments=memory.arguments, estimate=memory.peak, learner=memory.learner, parts=memory.parts,
        ),
        flops=_flops(program),
        traffic=_traffic(program),
        roofline=roof._asdict(),
        run=_run(cfg, roof, mesh.size // chip.devices),
    )  # fmt: skip
    if cost:
        out["compiled"] = cost._asdict() | dict(
            buffers=[b._asdict() | dict(what=name_of(cfg, mesh, b.arrays)) for b in cost.buffers[:12]],
            collectives=[one._asdict() | dict(axes="+".join(one.axes)) for one in cost.collectives],
        )
    if better := cheaper(cfg, mesh, memory):
        out["memory"]["next"] = better
    return out


def _how(learner: Learner, mesh: Mesh) -> dict[str, Any]:
    run = execution(learner, mesh)
    names = ("remat", "offload", "compute_dtype", "reduce_dtype", "attention", "exchange", "dispatch", "grouped_matmul")
    return dict(trains=learner.optimizer is not None, microbatches=learner.microbatches) | {
        name: getattr(run, name) for name in names
    }


def _flops(program: Program) -> dict[str, Any]:
    parts: defaultdict[str, float] = defaultdict(float)
    for (learner, part), flops in program.flops.items():
        parts[f"{learner}/{part}"] += flops.all
    return dict(model=program.model_flops, once=program.total.once, again=program.total.again, parts=dict(parts))


def _traffic(program: Program) -> list[dict[str, Any]]:
    sums: defaultdict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in program.collectives:
        found = sums[one.kind, "+".join(one.axes), one.dtype]
        found[:] = found[0] + one.operand, found[1] + one.wire
    rows = [dict(kind=k, axes=a, dtype=d, operand=o, wire=w) for (k, a, d), (o, w) in sums.items()]
    return sorted(rows, key=lambda row: -row["wire"])


def _run(cfg: RunConfig, roof: Roofline, chips_used: int) -> dict[str, float | int]:
    steps = cfg.train.steps - max(learner.optimizer.start for learner in cfg.learners.values() if learner.optimizer)
    days = steps * roof.step / 86400
    tokens = cfg.train.batch * cfg.train.seq_len * steps
    return dict(steps=steps, tokens=tokens, days=days, chip_hours=24 * days * chips_used)


# --- What holds the peak, and what would lower it


def name_of(cfg: RunConfig, mesh: Mesh, arrays: str) -> str:
    """What a buffer holds, guessed from the largest array's shape; "" where no shape is known."""
    found = [(kind, [int(n) for n in dims.split(",")]) for kind, dims in re.findall(r"(\w+)\[([\d,]+)\]", arrays)]
    if not found:
        return ""
    dtype, dims = max(found, key=lambda one: math.prod(one[1]))
    weights = (s.params for s in abstract_state(cfg, mesh).learners.values())
    shards = {math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(list(weights)) if len(x.shape) > 2}
    for learner in cfg.learners.values():
        model, size = learner.model, mesh.shape
        D, V = model.embed_dim, model.vocab_size // size["tensor"] // size["expert"]
        R = cfg.train.batch * cfg.train.seq_len // math.prod(size[a] for a in MESH_AXES[:4]) // learner.microbatches
        fp32 = dtype == "f32"
        if fp32 and math.prod(dims) in shards:
            return "weights, their gradients or moments, as stored"
        if V in dims and D in dims:
            return "embedding or head: gradient, fp32" if fp32 else "embedding or head, whole"
        if V in dims:
            return "logits of a chunk of tokens"
        if D in dims and math.prod(dims) % (R * D) == 0 and math.prod(dims) > R * D and not fp32:
            layers = math.prod(dims) // (R * D)
            if layers in (model.num_layers, model.num_blocks, len(model.pattern)):
                return f"inputs of {layers} layers, to recompute from"
        widths = {model.expert_dim, 2 * model.expert_dim, model.dense_dim, 2 * model.dense_dim}
        widths = {w // size["tensor"] for w in widths}
        if D in dims and widths & set(dims):
            return "feed-forward weights of a layer: gradient, fp32" if fp32 else "feed-forward weights of a layer"
        if widths & set(dims):
            return "feed-forward activations of a layer"
        if model.head_dim in dims and model.num_heads // size["tensor"] in dims:
            return "queries or outputs of a layer's attention"
        if D in dims:
            return "activations of a layer"
    return ""


def changes(cfg: RunConfig, learner: str) -> Iterator[tuple[str, Callable[[RunConfig], RunConfig]]]:
    """Changes of one option that need less memory: the option as it is written, and what it makes of a run."""
    one, of = cfg.learners[learner], _option_prefix(cfg, learner)

    def of_learner(**fields: Any) -> Callable[[RunConfig], RunConfig]:
        return lambda cfg: replace(cfg, learners=cfg.learners | {learner: replace(one, **fields)})

    if one.optimizer is None:
        return
    slower = {"none": "attention", "attention": "layer", "block": "layer", "layer": "nested"}
    if one.remat in slower:
        yield f"--{of}remat {slower[one.remat]}", of_learner(remat=slower[one.remat])
    yield f"--{of}microbatches {2 * one.microbatches}", of_learner(microbatches=2 * one.microbatches)
    if one.optimizer.kind != "adafactor" and one.optimizer.moment_dtype == "float32":
        option = f"--{of}optimizer.moment-dtype bfloat16"
        yield option, of_learner(optimizer=replace(one.optimizer, moment_dtype="bfloat16"))
    yield (
        f"--mesh.tensor {2 * cfg.mesh.tensor}",
        lambda cfg: replace(cfg, mesh=replace(cfg.mesh, tensor=2 * cfg.mesh.tensor)),
    )


def _option_prefix(cfg: RunConfig, learner: str) -> str:
    return "" if len(cfg.learners) == 1 else f"learners.{learner}."


def cheaper(cfg: RunConfig, mesh: Mesh, now: Memory) -> dict[str, Any] | None:
    """The one option whose change lowers the estimate most, and to what."""
    found = []
    for option, change in changes(cfg, now.learner):
        try:
            other = change(cfg)
            its_mesh = make_mesh(other.mesh, list(mesh.devices.flat)) if other.mesh != cfg.mesh else mesh
            check_fits(other, its_mesh)
        except ValueError:
            continue
        found.append(dict(option=option, peak=estimate(other, its_mesh).peak))
    best = min(found, key=lambda one: one["peak"], default=None)
    return best if best and best["peak"] < now.peak else None


# --- Search


def candidates(cfg: RunConfig, devices: int) -> Iterator[RunConfig]:
    """The run on other meshes, with other remat policies and microbatches; as many devices as there are."""
    powers = [2**i for i in range(devices.bit_length())]
    models = [learner.model for learner in cfg.learners.values()]
    for expert, context, tensor in itertools.product(powers, powers, (1, 2, 4, 8)):
        if devices % (expert * context * tensor) or any(m.num_experts % expert for m in models):
            continue
        if cfg.train.seq_len // context < min(m.chunk for m in models) and context > 1:
            continue
        fsdp = devices // (expert * context * tensor)
        widths = min(m.embed_dim & -m.embed_dim for m in models)  # what splits it evenly
        replica = max(1, fsdp * expert * context // widths)
        mesh = MeshConfig(replica=replica, fsdp=max(1, fsdp // replica), expert=expert, context=context, tensor=tensor)
        for remat, microbatches in itertools.product(("attention", "layer", "nested"), (1, 2, 4, 8)):
            travel = dict(dispatch="all_to_all") if expert > 1 else dict(dispatch="fsdp")
            how = dict(remat=remat, microbatches=microbatches, **travel)
            learners = {
                name: replace(learner, **(how if learner.optimizer else travel))
                for name, learner in cfg.learners.items()
            }
            yield replace(cfg, mesh=mesh, learners=learners)


def search(cfg: RunConfig, topology: str, log: Callable[[str], object] = lambda _: None) -> list[dict[str, Any]]:
    """Candidates that fit, by the least time of their step, fastest first; formulas alone.

    Of equal ones the one that needs less memory comes first. [] where none fits.
    """
    devices = chips.devices(topology)
    chip = chips.CHIPS[topology.partition(":")[0]]
    found, states, meshes = [], {}, {}
    for one in candidates(cfg, len(devices)):
        try:
            if one.mesh not in meshes:
                meshes[one.mesh] = make_mesh(one.mesh, devices)
                states[one.mesh] = abstract_state(one, meshes[one.mesh])
                log(f"{len(found)} fit so far")
            mesh = meshes[one.mesh]
            check_fits(one, mesh)
        except ValueError:
            continue
        memory = estimate(one, mesh, states[one.mesh])
        if memory.peak > ROOM * chip.hbm / chip.devices:
            continue
        roof = roofline(estimate_program(one, mesh, states[one.mesh]), mesh)
        found.append(dict(cfg=one, memory=memory, roofline=roof, options=options(cfg, one)))
    return sorted(found, key=lambda one: (round(one["roofline"].step, 3), one["memory"].peak))


def options(before: RunConfig, after: RunConfig) -> str:
    """What to write on the command line to get from one run to the other; an axis of -1 takes what is left anyhow."""
    words = [
        f"--mesh.{name} {size}" for name, size in vars(after.mesh).items() if vars(before.mesh)[name] not in (size, -1)
    ]
    for name, learner in after.learners.items():
        old = before.learners[name]
        words += [
            f"--{_option_prefix(after, name)}{field} {getattr(learner, field)}"
            for field in ("remat", "microbatches", "dispatch")
            if getattr(learner, field) != getattr(old, field)
        ]
    return " ".join(words)
