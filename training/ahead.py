"""A run's step compiled ahead of time for devices that are not here: does it fit, and how long does compiling take."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from data.batch import DTYPES, Batch
from training import h100, hlo
from training.config import RunConfig
from training.mesh import BATCH_SPEC
from training.state import abstract_state
from training.step import make_train_step

GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def no_device_needed() -> None:
    """Say so to jax and libtpu; before jax is first asked for a device, which its plugins would look for."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


def check_compiler(topology: str) -> None:
    """ValueError, in a line, where the package that compiles for such devices is not installed."""
    extra, packages = ("cuda", GPU_PLUGINS) if topology.partition(":")[0] in h100.KINDS else ("tpu", ("libtpu",))
    if not any(importlib.util.find_spec(name) for name in packages):
        raise ValueError(f"compiling for {topology} needs {' or '.join(packages)}: pip install -c constraints.txt "
                         f"-e '.[{extra}]', or take --fast, which compiles nothing")  # fmt: skip


def devices_of(topology: str) -> list[Any]:
    """Devices to compile for: the chips of v5p:4x4x8 and the like (needs the package libtpu, no TPU), h100:HOSTSx8 or
    h200:HOSTSx8 (the extra `cuda`, no GPU)."""
    kind, _, shape = topology.partition(":")
    if kind in h100.KINDS:
        return h100.topology(*(int(n) for n in shape.split("x")), kind=kind)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    shape, placed = (cfg.train.batch, cfg.train.seq_len), NamedSharding(mesh, BATCH_SPEC)
    batch = Batch(**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for name, dtype in DTYPES.items()})
    if cfg.images is None:
        return batch
    tiles, size, _ = cfg.images
    pixels = jax.ShapeDtypeStruct((cfg.train.batch, tiles, size, size, 3), jnp.uint8, sharding=placed)
    return batch._replace(tiles=pixels, slots=jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed))


class Cost(NamedTuple):
    """What compiling a step took, in seconds, and what the program holds on each device, in bytes."""

    trace: float
    compile: float
    arguments: int  # state and batch
    temporaries: int
    outputs: int  # those that do not reuse an argument's buffer
    peak: int  # as the compiler reports it, where it does
    buffers: tuple[
        hlo.Buffer, ...
    ]  # largest first, beside the arguments; none where the compiler writes no live ranges
    collectives: tuple[hlo.Sent, ...]  # as compiled (`training/hlo.py`)


def compile_step(cfg: RunConfig, mesh: Mesh, domains: int = 1) -> tuple[Any, Cost]:
    """(the compiled step, its cost)."""
    start = time.perf_counter()
    gpu = mesh.devices.flat[0].platform != "tpu"
    with h100.cross_compiling() if gpu else nullcontext(), tempfile.TemporaryDirectory() as folder:
        lowered = make_train_step(cfg, mesh, domains).lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh))
        traced = time.perf_counter()
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        done = time.perf_counter()
        text, live = _dumped(Path(folder))
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    buffers, sent = hlo.at_peak(live, text), hlo.collectives(text, mesh)
    cost = Cost(traced - start, done - traced, m.argument_size_in_bytes, m.temp_size_in_bytes, outputs,
                getattr(m, "peak_memory_in_bytes", 0), buffers, tuple(sent))  # fmt: skip
    return compiled, cost


def _dumped(folder: Path) -> tuple[str, str]:
    """(the optimised program, when its values live) of the largest module; "" for what was not written."""
    texts = sorted(folder.rglob("*after_optimizations.txt"), key=lambda file: file.stat().st_size)
    if not texts:
        return "", ""
    live = texts[-1].with_name(f"{texts[-1].stem}-live-range.txt")
    return texts[-1].read_text(encoding="utf-8"), live.read_text(encoding="utf-8") if live.exists() else ""
