"""A run's step compiled ahead of time for devices that are not here: does it fit, and how long does compiling take."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from data.batch import DTYPES, Batch
from training.config import RunConfig
from training.mesh import BATCH_SPEC
from training.state import abstract_state
from training.step import make_train_step

GIB = 2**30


def tpu_devices(topology: str) -> list[Any]:
    """The chips of a TPU topology such as v5p:4x4x8; needs the package libtpu, and no TPU."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    shape, placed = (cfg.train.batch, cfg.train.seq_len), NamedSharding(mesh, BATCH_SPEC)
    return Batch(**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for name, dtype in DTYPES.items()})


class Cost(NamedTuple):
    """What compiling a step took, in seconds, and what the program holds on each device, in bytes."""

    trace: float
    compile: float
    arguments: int  # state and batch
    temporaries: int
    outputs: int  # those that do not reuse an argument's buffer
    peak: int  # as the compiler reports it, where it does


def compile_step(cfg: RunConfig, mesh: Mesh, domains: int = 1) -> tuple[Any, Cost]:
    """(the compiled step, its cost)."""
    start = time.perf_counter()
    lowered = make_train_step(cfg, mesh, domains).lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh))
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    cost = Cost(traced - start, done - traced, m.argument_size_in_bytes, m.temp_size_in_bytes, outputs,
                getattr(m, "peak_memory_in_bytes", 0))  # fmt: skip
    return compiled, cost
