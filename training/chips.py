"""Accelerators by their data sheets, and devices that stand in for absent ones. Nothing here was measured."""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclass(frozen=True)
class Chip:
    """Of one chip: dense peaks in FLOP/s, bytes, and bytes a second in one direction."""

    kinds: tuple[str, ...]
    """What JAX calls its devices, or how that begins."""
    bf16: float
    hbm: float
    hbm_rate: float
    link: float
    """Of a link of the torus; of a GPU into its host's switch."""
    network: float
    """Its share of its host's adapters, between slices or hosts."""
    host: int
    """Chips of a host."""
    torus: int = 0
    """Axes of the torus, two links each; 0 for a switch."""
    ring: int = 1
    """An axis of the torus closes to a ring where its length is a multiple of this."""
    fp8: float | None = None
    int8: float | None = None
    devices: int = 1
    """JAX devices of a chip, among which all of the above is split."""


# TPUs: Google's pages docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} and the table of generations on the last one.
# They give ICI as both directions of all links of a chip (400, 1200, 800, 1200 GB/s): divided by 2 and by twice the
# axes of the torus. That slices of whole cubes of 4 x 4 x 4 are full tori is on v5p's page; for tpu7x it is taken over
# from there. That a v5e or v6e axis closes at 16 chips alone (a pod is 16 x 16) is common knowledge, not on its page.
# v5e's DCN is its pod's (6.4 Tb/s) over 256 chips, equal to 2 x 100 Gb/s a host of 8; the others' is given a chip.
# Uncertain: fp8 of v6e (918 on tpu7x's page, where others quote its int8's 1836); int8 of v5p (918 elsewhere) and of
# tpu7x are not on those pages and left out. v5e's bandwidth reads 819 GB/s or 800 GiB/s.
# H100 SXM: NVIDIA's H100 data sheet, dense (its 1,979 and 3,958 are with sparsity): 80 GB, 3.35 TB/s, NVLink 900 GB/s
# both ways; its figures were found quoted, not on NVIDIA's own page. Network: one 400 Gb/s adapter a GPU as in a DGX
# H100; other hosts differ. H200 SXM: the same processor beside 141 GB at 4.8 TB/s (found quoted likewise).
CHIPS: dict[str, Chip] = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), bf16=197 * TERA, int8=393 * TERA, hbm=16 * GB, hbm_rate=819 * GB,
                link=50 * GB, torus=2, ring=16, network=25 / 8 * GB, host=8),
    "v5p": Chip(("TPU v5", "TPU v5p"), bf16=459 * TERA, fp8=459 * TERA, hbm=95 * GIB, hbm_rate=2765 * GB,
                link=100 * GB, torus=3, ring=4, network=50 / 8 * GB, host=4),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), bf16=918 * TERA, fp8=918 * TERA, int8=1836 * TERA, hbm=32 * GIB,
                hbm_rate=1638 * GB, link=100 * GB, torus=2, ring=16, network=100 / 8 * GB, host=8),
    "tpu7x": Chip(("TPU7x",), bf16=2307 * TERA, fp8=4614 * TERA, hbm=192 * GIB, hbm_rate=7380 * GB,
                  link=100 * GB, torus=3, ring=4, network=100 / 8 * GB, host=4, devices=2),
    "h100": Chip(("NVIDIA H100",), bf16=989 * TERA, fp8=1979 * TERA, int8=1979 * TERA, hbm=80 * GB, hbm_rate=3350 * GB,
                 link=450 * GB, network=400 / 8 * GB, host=8),
    "h200": Chip(("NVIDIA H200",), bf16=989 * TERA, fp8=1979 * TERA, int8=1979 * TERA, hbm=141 * GB, hbm_rate=4800 * GB,
                 link=450 * GB, network=400 / 8 * GB, host=8),
}  # fmt: skip
OTHER_PEAKS = {
    "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.0, "NVIDIA H200 NVL": 835.0, "NVIDIA A100": 312.0,
}  # fmt: skip
"""Dense bf16 TFLOP/s of kinds of devices of which nothing else is needed; vendors' data sheets."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of JAX's devices of a kind, or None where it is not in the table."""
    sheets: dict[str, Chip | None] = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    return _longest(device_kind, sheets | dict.fromkeys(OTHER_PEAKS))


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of a kind, or None where it is in neither table (a CPU)."""
    peaks = {kind: chip.bf16 / chip.devices for chip in CHIPS.values() for kind in chip.kinds}
    return _longest(device_kind, peaks | {kind: peak * TERA for kind, peak in OTHER_PEAKS.items()})


def _longest(device_kind: str, table: dict[str, Any]) -> Any:
    kinds = [kind for kind in table if device_kind.startswith(kind)]
    return table[max(kinds, key=len)] if kinds else None


# --- Devices that are not here


@dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    client: Any = None


def devices(name: str, slices: int = 1) -> list[Device]:
    """Stand-ins for v5p:4x4x8, v5e:16x16 ..., h100:HOSTSx8, or h100:1x2 for a part of one host; a mesh of them can be
    traced for, not compiled for."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip, shape = (CHIPS.get(found[1]), [int(n) for n in found[2].split("x")]) if found else (None, [])
    if chip is None or len(shape) != (chip.torus or 2) or min(shape) < 1 or not (chip.torus or _hosts(shape, chip)):
        every = ", ".join(f"{kind}:{_example(one)}" for kind, one in CHIPS.items())
        raise ValueError(f"no devices {name!r}; the nearest are {_nearest(name)!r} (all: {every})")
    platform = "tpu" if chip.torus else "cuda"
    places = list(itertools.product(*map(range, shape[::-1] if chip.torus else shape)))  # x, or the GPU, runs fastest
    made = [
        Device(0, platform, chip.kinds[0], (*at[::-1], 0, 0)[:3], core, part, (part * len(places) + i) // chip.host)
        for part in range(slices)
        for i, at in enumerate(places)
        for core in range(chip.devices)
    ]
    return [replace(device, id=i) for i, device in enumerate(made)]


def _hosts(shape: list[int], chip: Chip) -> bool:
    """Whole hosts of GPUs, or some GPUs of one."""
    return shape[1] == chip.host or (shape[0] == 1 and chip.host % shape[1] == 0)


def _nearest(name: str) -> str:
    """A name that there is: the likest kind, with the sizes given as far as it can have them."""
    kind, _, shape = name.lower().partition(":")
    kind = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0)[0]
    chip, sizes = CHIPS[kind], [max(1, int(n)) for n in re.findall(r"\d+", shape)]
    if not chip.torus:
        return f"{kind}:{sizes[0] if sizes else 1}x{chip.host}"
    return f"{kind}:{'x'.join(map(str, [*sizes, *[4] * chip.torus][: chip.torus]))}"


def _example(chip: Chip) -> str:
    return "x".join(["4"] * chip.torus) if chip.torus else f"HOSTSx{chip.host}"
