"""The least time that a step can take on its devices, from what it counts (`training/program.py`) and data sheets.

    mesh = make_mesh(cfg.mesh, devices("v5p:4x4x8"))
    roofline(count(cfg, mesh), mesh)

A step's time is the largest of what its matrix products, its HBM traffic and its traffic on each network would take
alone at peak rates: everything overlaps perfectly, which is optimistic. On one network collectives follow each other.

**What a mesh axis runs over.** Inside a TPU slice all axes run over the torus (`ici`). A collective whose devices
spread over several axes of the torus uses the links of all of them, in both directions where an axis closes to a ring,
in one where it is a line; a link that k interleaved groups share counts as a k-th. All-to-alls are bound by the links
across the middle; a mirrored exchange crosses them with all it sends. Between slices (`replica`) it is the data
centre's network (`dcn`). The GPUs of a host are one NVLink switch (`nvlink`). Whatever leaves a host or a slice takes
each chip's share of its host's adapters (`network`, `dcn`), and a ring through m chips of it uses m of those.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama4_jax.axes import MESH_AXES
from training.chips import CHIPS, Chip, chip_of
from training.program import Collective, Program


class Roofline(NamedTuple):
    """The least time of a step."""

    seconds: dict[str, float]  # alone, by resource: compute, hbm, and the networks that are used
    bound: str  # the slowest of them, which a step takes
    step: float
    tokens_per_second: float
    mfu: float  # model FLOPs over what the peak would do in that time
    assumed: dict[str, Any]  # peak rates of a chip, and the efficiency of matrix products


def roofline(program: Program, mesh: Mesh, efficiency: float = 1.0) -> Roofline:
    """`efficiency`: the share of the bf16 peak that matrix products reach, whatever their dtype; 1 bounds all."""
    kind = mesh.devices.flat[0].device_kind
    if (chip := chip_of(kind)) is None:
        raise ValueError(f"no data sheet of {kind!r}: there are {', '.join(CHIPS)}")
    seconds = dict(
        compute=program.total.all / (chip.bf16 / chip.devices * efficiency),
        hbm=sum(program.hbm.values()) / (chip.hbm_rate / chip.devices),
    )
    for one in program.collectives:
        network, time = seconds_of(one, chip, mesh)
        seconds[network] = seconds.get(network, 0.0) + time
    bound = max(seconds, key=seconds.__getitem__)
    step = seconds[bound]
    peak = program.devices * chip.bf16 / chip.devices
    return Roofline(
        seconds, bound, step, program.tokens / step, program.model_flops / step / peak,
        asdict(chip) | dict(efficiency=efficiency),
    )  # fmt: skip


def seconds_of(one: Collective, chip: Chip, mesh: Mesh) -> tuple[str, float]:
    """The network that a collective is bound by, and its time alone on it over a step."""
    group = _group(mesh, one.axes)
    exchange = one.kind in ("all_to_all", "ragged_all_to_all", "ppermute")
    island = "slice_index" if chip.torus else "process_index"
    _, members = np.unique([getattr(device, island, 0) for device in group], return_counts=True)
    own_network, inside = chip.network / chip.devices, int(members.max())
    if len(members) > 1:
        leaving = (len(group) - inside) / max(len(group) - 1, 1)
        rate = own_network / leaving if exchange else own_network * inside
        return "dcn" if chip.torus else "network", one.wire / (rate if chip.torus else min(rate, chip.link))
    if not chip.torus:
        return "nvlink", one.wire / chip.link
    link = chip.link / chip.devices
    lines = [line for i in range(chip.torus) if (line := _line(chip, mesh, group, i)).length > 1]
    if not lines:  # the devices of one chip; how fast they talk is on no data sheet
        return "ici", one.wire / link
    if exchange:
        crossing = max(line.length * line.stride / (4 * line.links) for line in lines)
        return "ici", one.wire * crossing * (2 if one.kind == "ppermute" else 1) / link
    return "ici", one.wire / (link * sum(line.links / line.stride for line in lines))


class _Line(NamedTuple):
    """Of an axis of the torus, what a collective's devices take up."""

    length: int
    stride: float  # between neighbours: so many such groups share its links
    links: int  # 2 for a ring, in both directions


def _line(chip: Chip, mesh: Mesh, group: list[Any], axis: int) -> _Line:
    places, whole = ({device.coords[axis] for device in some} for some in (group, mesh.devices.flat))
    length, closes = len(places), len(places) == len(whole) and len(whole) % chip.ring == 0
    return _Line(length, (max(places) - min(places)) / max(length - 1, 1), 2 if closes else 1)


def _group(mesh: Mesh, axes: tuple[str, ...]) -> list[Any]:
    """The devices that one collective over these axes joins."""
    taken = tuple(slice(None) if name in axes else 0 for name in MESH_AXES)
    return list(np.asarray(mesh.devices[taken]).flat)
