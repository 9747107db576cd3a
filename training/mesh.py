"""The mesh of a run, and where arrays lie on it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.axes import BATCH_AXES, CONTEXT, MESH_AXES, TENSOR
from llama4_jax.config import ModelConfig
from training.config import MeshConfig, RunConfig

BATCH_SPEC = P(BATCH_AXES, CONTEXT)
"""Of every array [B, T] of a batch."""


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh of all devices (or those given) with the five axes; the axis of size -1 takes what is left.

    Inside a TPU slice the axes follow its torus, the last ones (which talk most) first; other devices stay in their
    order. Of several slices each holds `replica / slices` replicas, whole and next to each other: nothing but a sum
    over `replica` leaves a slice. Processes of GPUs or CPUs are no slices. ValueError for sizes that do not fit.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    sizes = [getattr(cfg, name) for name in MESH_AXES]
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    replicas, *rest = sizes
    if replicas % slices:
        nearest = max(1, round(replicas / slices)) * slices
        raise ValueError(
            f"mesh.replica ({replicas}) must be a multiple of the {slices} slices, which nothing else may cross: "
            f"the nearest is {nearest}"
        )
    if int(np.prod(sizes)) != len(devices):
        shape = " x ".join(f"{n} {s}" for n, s in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"the mesh ({shape}) needs {int(np.prod(sizes))} devices, but there are {len(devices)}: "
                         f"the nearest that suits has {_nearest(cfg, len(devices))}")  # fmt: skip
    within, across = (replicas // slices, *rest), (slices, *[1] * len(rest))
    # Splitting a torus's axis between two of the mesh's is slower than not, and done only where nothing else fits.
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _nearest(cfg: MeshConfig, devices: int) -> str:
    """The least change of one axis (or of all) by which the mesh suits so many devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    changes = [
        (abs(math.log(n / max(1, size))), f"mesh.{name} {n}")
        for name, size in vars(cfg).items() if size != -1
        for n in sizes if replace(cfg, **{name: n}).suits(devices)
    ]  # fmt: skip
    return min(changes, default=(0.0, f"mesh.fsdp {devices} and 1 along the other axes"))[1]


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of PartitionSpecs as NamedShardings."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


class RowShare(NamedTuple):
    """Part `part` of `parts` equal ones of a batch's rows; it lies at these `places` along the batch axes."""

    part: int
    parts: int
    places: tuple[int, ...]


def row_share(mesh: Mesh, process: int | None = None) -> RowShare:
    """The rows that this process (or the one named) reads: what its devices need.

    Processes whose devices lie along the context or tensor axis share a part: each reads its rows whole and takes its
    columns. ValueError where a process would need rows of several parts that others need, too.
    """
    process = jax.process_index() if process is None else process
    ways = int(np.prod([mesh.shape[name] for name in BATCH_AXES]))
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(ways, -1)
    places: dict[frozenset[int], list[int]] = {}  # by the processes that hold them
    for place, of_place in enumerate(owners):
        places.setdefault(frozenset(of_place.tolist()), []).append(place)
    even = len({len(some) for some in places.values()}) == 1 and sum(map(len, places)) == len(set().union(*places))
    if not even:
        raise ValueError(
            f"mesh.context x mesh.tensor ({owners.shape[1]}) must divide the devices of a process "
            f"({(owners == owners[0, 0]).sum()}) or be a multiple of them: rows are dealt out by process"
        )
    part = next(i for i, group in enumerate(places) if process in group)
    return RowShare(part, len(places), tuple(list(places.values())[part]))


def deals_heads(model: ModelConfig, mesh: Mesh) -> bool:
    """Whether the context axis can take heads in exchange for sequence; few kv heads may go to several devices."""
    ways, heads, kv_heads = (
        mesh.shape[CONTEXT],
        *(n // mesh.shape[TENSOR] for n in (model.num_heads, model.num_kv_heads)),
    )
    return heads % ways == 0 and (kv_heads % ways == 0 or ways % max(kv_heads, 1) == 0)


def check_fits(cfg: RunConfig, mesh: Mesh) -> None:
    """ValueError, in a line, for a batch or a model that cannot be split over the mesh as it is."""
    size = mesh.shape
    shared = size[CONTEXT] * size[TENSOR]
    row_share(mesh)
    if cfg.train.seq_len % size[CONTEXT]:
        nearest = _divisor(cfg.train.seq_len, size[CONTEXT])
        raise ValueError(f"train.seq_len ({cfg.train.seq_len}) must be a multiple of mesh.context ({size[CONTEXT]}): "
                         f"the nearest that divides it is {nearest}")  # fmt: skip
    if cfg.train.tiles % size[CONTEXT]:
        nearest = max(1, round(cfg.train.tiles / size[CONTEXT])) * size[CONTEXT]
        raise ValueError(f"train.tiles ({cfg.train.tiles}) must be a multiple of mesh.context ({size[CONTEXT]}): the "
                         f"nearest is {nearest}")  # fmt: skip
    for name, learner in cfg.learners.items():
        rows = int(np.prod([size[a] for a in BATCH_AXES])) * learner.microbatches
        if cfg.train.batch % rows:
            raise ValueError(
                f"train.batch ({cfg.train.batch}) must be a multiple of replica x fsdp x expert x {name}'s "
                f"microbatches = {rows}: the nearest is {max(1, round(cfg.train.batch / rows)) * rows}"
            )
        if learner.exchange == "heads" and not deals_heads(learner.model, mesh):
            raise ValueError(
                f"{name}: exchange heads cannot deal {learner.model.num_heads} query and {learner.model.num_kv_heads} "
                f"kv heads over mesh.context x mesh.tensor = {shared}: exchange mirror and gather take any number"
            )
        check_divides(name, learner.model, mesh)


def check_divides(name: str, model: ModelConfig, mesh: Mesh) -> None:
    """ValueError, in a line, for a model whose weights cannot be split over the mesh as it is."""
    for what, value, axes in _divisions(model):
        ways = int(np.prod([mesh.shape[a] for a in axes]))
        if value % ways:
            raise ValueError(f"{name}: {what} ({value}) must be a multiple of {' x '.join(axes)} = {ways}: the "
                             f"nearest that divides it is {_divisor(value, ways)}")  # fmt: skip


def _divisor(value: int, near: int) -> int:
    return min((n for n in range(1, min(value, 2 * near) + 1) if value % n == 0), key=lambda n: abs(math.log(n / near)))


def _divisions(model: ModelConfig) -> list[tuple[str, int, tuple[str, ...]]]:
    vision = [
        ("vision.num_heads", model.vision.num_heads, ("tensor",)),
        ("vision.mlp_dim", model.vision.mlp_dim, ("tensor",)),
        ("vision.adapter_dim", model.vision.adapter_dim, ("fsdp", "expert", "context")),
    ] if model.vision else []  # fmt: skip
    return [
        *vision,
        ("num_heads", model.num_heads, ("tensor",)),
        ("num_kv_heads", model.num_kv_heads, ("tensor",)),
        ("vocab_size", model.vocab_size, ("tensor", "expert")),
        ("expert_dim", model.expert_dim, ("tensor",)),
        ("dense_dim", model.dense_dim, ("tensor",)),
        ("embed_dim", model.embed_dim, ("fsdp", "expert", "context")),
        ("num_experts", model.num_experts, ("expert",)),
    ]
