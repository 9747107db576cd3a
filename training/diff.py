"""Two checkpoints of any kind, weight by weight: how far apart, and in which layer first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama4_jax import hf
from llama4_jax.config import ModelConfig
from training.checkpoint_arrays import weight_shapes
from training.weights import Ranges, Weights

IGNORED = ("init_std", "max_position", "router_bias")
"""Settings of a model that change nothing of what is compared."""
PIECE = 2**24


class Difference(NamedTuple):
    """Of one weight of one layer (all experts of it)."""

    name: str
    layer: int | None
    largest: float  # max |a - b|
    relative: float  # of max |b|
    equal: bool  # bit for bit, or but for the rounding of one to bfloat16


def settings(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Lines `field: a's != b's` of the two models' configurations."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name not in IGNORED)
    return [f"{name}: {x} != {y}" for name, x, y in pairs if x != y]


def compare(a: Weights, b: Weights, rounded: bool = False) -> Iterator[Difference]:
    """Every weight, in the order of the layers, a slice of an expert at a time; ValueError where shapes differ.

    `rounded`: equal means equal to the other rounded to bfloat16.
    """
    shapes, others = weight_shapes(a.cfg), weight_shapes(b.cfg)
    shapes, others = ({p: s for p, s in some.items() if p[-1] != hf.ROUTER_BIAS} for some in (shapes, others))
    for path in [*shapes, *(others.keys() - shapes.keys())]:
        if shapes.get(path) != others.get(path):
            raise ValueError(f"{'.'.join(map(str, path))} is {shapes.get(path, 'nothing')} in {a.where}, "
                             f"{others.get(path, 'nothing')} in {b.where}")  # fmt: skip
    inside = sorted((p for p in shapes if p[0] == "blocks"), key=lambda p: p[2])
    outside = [p for p in shapes if p[0] != "blocks"]
    for path in outside[:1]:
        yield _one(a, b, path, (), shapes[path], None, rounded)
    for block in range(a.cfg.num_blocks):
        for path in inside:
            layer = block * a.cfg.period + int(path[2])
            yield _one(a, b, path, (block,), shapes[path][1:], layer, rounded)
    for path in outside[1:]:
        yield _one(a, b, path, (), shapes[path], None, rounded)


def _one(
    a: Weights, b: Weights, path: hf.Path, index: tuple[int, ...], shape: tuple[int, ...], layer: int | None,
    rounded: bool,
) -> Difference:  # fmt: skip
    largest = scale = 0.0
    equal = True
    for inner, ranges in _slices(path, index, shape):
        x, y = a.read(path, inner, ranges), b.read(path, inner, ranges)
        gap = np.abs(x - y)
        largest = float(np.maximum(largest, np.max(gap)))  # NaN stays
        scale = max(scale, float(np.max(np.abs(y))))
        if rounded:
            x, y = (w.astype(ml_dtypes.bfloat16) for w in (x, y))
        bits = np.uint16 if rounded else np.uint32
        equal &= np.array_equal(np.ascontiguousarray(x).view(bits), np.ascontiguousarray(y).view(bits))
    name = ".".join(map(str, path[3:] if layer is not None else path))
    return Difference(name, layer, largest, largest / scale if scale else largest, equal)


def _slices(path: hf.Path, index: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Ranges]]:
    """A weight in slices of about `PIECE` elements: each expert by itself, and rows of the first letter."""
    letters = str(path[-1]).rsplit("_", 1)[1]
    for expert in range(shape[0]) if letters[0] == "E" and len(letters) > 1 else (None,):
        place = index if expert is None else (*index, expert)
        inner, sizes = (letters, shape) if expert is None else (letters[1:], shape[1:])
        step = max(1, PIECE // int(np.prod(sizes[1:])))
        for first in range(0, sizes[0], step):
            yield place, {inner[0]: (first, min(first + step, sizes[0]))}
