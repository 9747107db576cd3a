"""A compiled program by what its compiler wrote down: its collectives, and what lives where it holds most.

    collectives(text, mesh)
    at_peak(live_ranges, text)

XLA merges, splits, moves and drops collectives, and adds some where it partitions by itself. Each counts as often as
the loops around it run, which the compiler writes beside a `while`, or which its condition compares with; of a choice
the branch counts that sends most. Kinds and bytes are named as in `training/program.py`: `operand` goes in, `wire` is
sent. An asynchronous pair is one. What a backend sends by its own means (a custom call) is not seen.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = {"all-gather": "all_gather", "all-reduce": "all_reduce", "reduce-scatter": "reduce_scatter",
         "all-to-all": "all_to_all", "ragged-all-to-all": "ragged_all_to_all",
         "collective-permute": "ppermute"}  # fmt: skip
DTYPES = dict(bf16="bfloat16", f32="float32", f16="float16", f8e4m3fn="float8_e4m3fn", f8e5m2="float8_e5m2", s8="int8",
              s32="int32", u32="uint32", pred="bool")  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+(?:fn|fnuz)?)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")


def sends(kind: str, devices: int, permutation: Sequence[tuple[int, int]] = ()) -> float:
    """Bytes on the wire for each byte of the operand (`training/program.py`, `Collective`)."""
    if kind == "ppermute":
        return float(any(source != target for source, target in permutation))
    return {"all_gather": devices - 1.0, "all_reduce": 2 - 2 / devices}.get(kind, 1 - 1 / devices)


class Sent(NamedTuple):
    """One kind of collective over some axes, added up over a step of one device."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    calls: float
    operand: float
    wire: float


class _Instruction(NamedTuple):
    kind: str  # of a collective, or the operation's name
    line: str
    type: str


def collectives(text: str, mesh: Mesh) -> list[Sent]:
    """Of a whole module; most bytes on the wire first."""
    if not text:
        return []
    parts, entry = _computations(text)
    totals: dict[str, dict[tuple, np.ndarray]] = {}

    def total(name: str) -> dict[tuple, np.ndarray]:
        if name not in totals:
            sums: defaultdict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(3))
            for one in parts.get(name, ()):
                if one.kind in KINDS.values():
                    key, size = _sent(one, mesh)
                    if key is not None:
                        sums[key] += size
                    continue
                for times, inner in _inside(one, parts, total):
                    for key, size in inner.items():
                        sums[key] += times * size
            totals[name] = dict(sums)
        return totals[name]

    found = [Sent(*key, *map(float, size)) for key, size in total(entry).items()]
    return sorted(found, key=lambda one: -one.wire)


def _inside(one: _Instruction, parts: dict, total: Any) -> list[tuple[float, dict]]:
    """What an instruction runs: (how often, its sums)."""
    if one.kind == "while":
        body = _CALLED.search(one.line)
        return [(_trips(one.line, parts), total(body[1]))] if body else []
    if one.kind == "conditional":
        found = _BRANCHES.search(one.line)
        names = [] if found is None else re.findall(r"[\w.\-]+", found[1] or f"{found[2]} {found[3]}")
        branches = [total(name) for name in names]
        return [(1.0, max(branches, key=lambda sums: sum(size[2] for size in sums.values())))] if branches else []
    if one.kind in ("async-update", "async-done"):
        return []
    return [(1.0, total(name)) for name in _CALLED.findall(one.line)]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(those instructions of each computation that may matter here, the name of the first one to run)."""
    parts: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = parts.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)$", line):
            kind, type_ = _operation(found[1])
            plain = KINDS.get(kind.removesuffix("-start"))
            if plain or "=%" in line or "={%" in line or kind in ("compare", "constant"):
                current.append(_Instruction(plain or kind, line, type_))
    return parts, entry


def _operation(right: str) -> tuple[str, str]:
    """(name, type) of what stands behind "=": a type, which may be a tuple, and an operation with its operands."""
    found = re.match(r"(.*?) ([a-z][\w\-]*)\(", right)
    return (found[2], found[1]) if found else ("", "")


def _trips(line: str, parts: dict[str, list[_Instruction]]) -> float:
    """How often a loop runs; NaN where nothing says so."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    limits = [
        int(found[1]) for one in parts.get(condition[1] if condition else "", ())
        if one.kind == "constant" and (found := re.search(r"constant\((\d+)\)", one.line))
    ]  # fmt: skip
    return float(limits[0]) if len(limits) == 1 else math.nan


def _sent(one: _Instruction, mesh: Mesh) -> tuple[tuple | None, np.ndarray]:
    """((kind, axes, dtype) or None where nobody talks to another, [calls, operand, wire])."""
    arrays = [(kind, math.prod(map(int, filter(None, dims.split(","))))) for kind, dims in _ARRAY.findall(one.type)]
    sizes = [(kind, count * _bits(kind) / 8) for kind, count in arrays]
    if re.search(r" collective-permute-start\(", one.line):
        sizes = [sizes[0]]
    pairs = _pairs(one.line)
    group = _group(one.line, mesh) if one.kind != "ppermute" else sorted({i for pair in pairs for i in pair})
    n, size = len(group), sum(size for _, size in sizes)
    if n < 2:
        return None, np.zeros(3)
    started = re.search(r" (all-gather|reduce-scatter)-start\(", one.line)  # its type: what goes in, what comes out
    share = {"all_gather": 1 + n if started else n, "reduce_scatter": (n + 1) / n if started else 1 / n}
    operand = size / share.get(one.kind, 1)
    axes = _axes(group if one.kind != "ppermute" else pairs[0], mesh)
    dtype = max(sizes, key=lambda one: one[1])[0]
    wire = operand * sends(one.kind, n, pairs)
    return (one.kind, axes, DTYPES.get(dtype, dtype)), np.array([1.0, operand, wire])


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(found[0]) if (found := re.findall(r"^[a-z]+(\d+)", kind)) else 0


def _pairs(line: str) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    pairs = re.findall(r"(\d+),(\d+)", found[1] if found else "")
    return [(int(a), int(b)) for a, b in pairs if a != b]


def _group(line: str, mesh: Mesh) -> list[int]:
    """The first group of devices that talk to each other."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(n) for n in found[3].split(",")]
        places = np.arange(math.prod(dims)).reshape(dims)
        if found[4]:
            places = places.transpose([int(n) for n in found[4].split(",")])
        return places.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in found[1].split(",")]
    if found := re.search(r"replica_groups=(?:mesh|@\w+)\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        within = re.findall(r"\w+", found[2])
        return places[tuple(slice(None) if name in within else 0 for name in sizes)].ravel().tolist()
    return list(range(mesh.size))


def _axes(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a group's devices differ."""
    places = np.array(np.unravel_index(list(group), tuple(mesh.shape.values())))
    return tuple(name for name, along in zip(mesh.shape, places, strict=True) if len(set(along.tolist())) > 1)


# --- Memory


class Buffer(NamedTuple):
    """Arrays of one shape, from one place of the program, that live where the program holds most."""

    bytes: int  # all of them
    arrays: str  # as the compiler writes them: "2×f32[16,5120,8192]"
    where: str  # scopes of the program, "" where the compiler made it up


GENERIC = {"jit", "train_step", "shard_map", "while", "body", "cond", "closed_call", "jvp", "transpose", "checkpoint",
           "rematted_computation", "pjit", "custom_vjp_call"}  # fmt: skip


def at_peak(live: str, text: str, least: int = 2**26) -> tuple[Buffer, ...]:
    """What lives where most does, by the compiler's live ranges, from 64 MiB on; the program's arguments are left out.

    That is the moment of the schedule at which sizes sum up to most. The peak beside it has gaps between buffers, too.
    """
    _, _, listed = live.partition(" (peak):\n")
    found = re.findall(r"^ +([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", listed, re.MULTILINE)
    wanted = {name for name, _, size in found}
    lines = re.findall(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*\(.*)$", text, re.MULTILINE)
    made = {name: (type_, rest) for name, type_, rest in lines if name in wanted}
    sums: dict[tuple[str, str], list[int]] = {}
    for name, index, size in found:
        type_, rest = made.get(name, ("", ""))
        if rest.startswith("parameter("):
            continue
        op = re.search(r'op_name="([^"]*)"', rest)
        one = sums.setdefault((_element(type_, index), _scopes(op[1] if op else "")), [0, 0])
        one[:] = one[0] + 1, one[1] + int(size)
    buffers = [
        Buffer(size, f"{count}×{array}" if count > 1 else array, where)
        for (array, where), (count, size) in sums.items()
    ]
    return tuple(sorted((one for one in buffers if one.bytes >= least), reverse=True))


def _element(type_: str, index: str) -> str:
    """An array's type, without its layout, at a place of a tuple's."""
    arrays = re.findall(r"\w+\[[\d,]*\]", type_)
    place = int(index.split(",")[0]) if index else 0
    return arrays[place] if place < len(arrays) else type_[:40]


def _scopes(op_name: str) -> str:
    names = re.findall(r"[^/()]+(?=[/)]|$)", op_name)
    named = [name for name in names[:-1] if name not in GENERIC and "->" not in name]
    backward = ["backward"] if "transpose(" in op_name else []
    return "/".join([*named, *backward])
