"""How fast a run's step is: the real step on synthetic tokens, without a corpus, a tokenizer or a folder."""

from __future__ import annotations

import dataclasses
import platform
import resource
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from data.batch import Batch, ImageShape
from data.packing import Document, Piece, Row, build_batch
from data.synthetic import uniform
from training.chips import peak_flops
from training.config import RunConfig
from training.flops import active_matmul_parameters, step_per_token
from training.loop import put_local
from training.mesh import check_fits, make_mesh, row_share
from training.state import create_state, execution
from training.step import make_train_step

BATCHES = 4
"""Different batches that the steps go through in turn, so that the router does not learn one by heart."""


def synthetic_batches(cfg: RunConfig, part: int = 0, parts: int = 1, count: int = BATCHES) -> list[Batch]:
    """Seeded uniform tokens; each row is the first `seq_len` tokens of a longer document, so every label counts.

    Of several processes each makes its own part of the rows of the global batch (`training.mesh.row_share`).
    """
    T, rows = cfg.train.seq_len, cfg.train.batch // parts
    vocabulary = min(learner.model.vocab_size for learner in cfg.learners.values())

    def row(n: int) -> Row:
        ids = uniform(vocabulary, T + 1, cfg.train.seed, part, n)
        return [Piece((0, n), 0, T, 0)], {(0, n): Document(ids, domain=0, document_id=n, first_visit=True)}

    images = ImageShape(*cfg.images) if cfg.images else None  # room for tiles costs the same, whatever they show
    return [build_batch([row(batch * rows + n) for n in range(rows)], T, 0, images) for batch in range(count)]


def bench_step(cfg: RunConfig, steps: int = 10, warmup: int = 3) -> dict[str, Any]:
    """Time `steps` steps after `warmup` untimed ones, with fresh weights whatever the learners' `init`.

    As in a run, a batch is placed before each step and the host waits for the step before the one just dispatched;
    a step's time is from one such return to the next. Returns, ready for JSON: tokens_per_second (its `median`,
    `quartiles` and `range` over steps) and step_seconds alike, compile_seconds (`trace` to the lowered module, and
    `compile`; whatever cache of compiled programs JAX is given counts), memory in bytes (`peak`, of the fullest
    device where devices count theirs, else of this process with all its compiling, as `peak_of` names; `program`: the
    step's arguments, outputs, aliases and temporaries on each device), learners (parameters and how each runs),
    model_tflops of a step and mfu (None where the peak is not known), and what it ran on and with.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(f"a benchmark takes at least 1 step and 0 of warm-up, not {steps} and {warmup}")
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    batches = synthetic_batches(cfg, *row_share(mesh)[:2])
    state = create_state(cfg, mesh)
    started = time.perf_counter()
    lowered = make_train_step(cfg, mesh, domains=1).lower(state, put_local(batches[0], mesh))
    traced = time.perf_counter()
    train_step = lowered.compile()
    compiled = time.perf_counter()
    learners = {
        name: dict(
            parameters=sum(x.size for x in jax.tree.leaves(state.learners[name].params)),
            active_matmul_parameters=active_matmul_parameters(learner.model),
            runs=_how(execution(learner, mesh)),
        )
        for name, learner in cfg.learners.items()
    }

    returned: list[float] = []
    before = None
    for step in range(warmup + steps + 2):
        state, metrics = train_step(state, put_local(batches[step % len(batches)], mesh))
        if before is not None:
            jax.block_until_ready(before)
            returned.append(time.perf_counter())
        before = metrics
    last = jax.device_get(before)
    for name, of in last.items():
        if not np.isfinite(of["grad_norm"]):
            raise FloatingPointError(f"{name}'s gradient norm is {of['grad_norm']}: its time would mean nothing")
    seconds = np.diff(returned)[warmup:].tolist()
    tokens = cfg.train.batch * cfg.train.seq_len
    return dict(
        preset=cfg.name, batch=cfg.train.batch, seq_len=cfg.train.seq_len, steps=steps, warmup=warmup,
        tokens_per_second=spread([tokens / s for s in seconds]),
        step_seconds=spread(seconds),
        compile_seconds=dict(trace=traced - started, compile=compiled - traced),
        memory=_peak(mesh) | dict(program=_program(train_step)),
        learners=learners,
        **_flops(cfg, mesh, tokens, statistics.median(seconds)),
        device=mesh.devices.flat[0].device_kind, devices=mesh.devices.size, mesh=dict(mesh.shape),
        jax=jax.__version__, python=platform.python_version(),
    )  # fmt: skip


def _how(run: Any) -> dict[str, Any]:
    """An `Execution` as it was resolved, but for where weights are stored."""
    return {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "rules"}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and range."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return dict(median=median, quartiles=[low, high], range=[min(values), max(values)])


def _peak(mesh: Any) -> dict[str, Any]:
    counted = [device.memory_stats() for device in mesh.local_devices]
    if all(stats and "peak_bytes_in_use" in stats for stats in counted):
        return dict(peak=max(stats["peak_bytes_in_use"] for stats in counted), peak_of="device")
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, peak_of="process")


def _program(train_step: Any) -> dict[str, int]:
    sizes = train_step.memory_analysis()
    return {kind: getattr(sizes, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp")}


def _flops(cfg: RunConfig, mesh: Any, tokens: int, seconds: float) -> dict[str, float | None]:
    step = tokens * step_per_token(cfg)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    rate = step / seconds / mesh.devices.size
    return dict(model_tflops=step / 1e12, tflops_per_second_and_device=rate / 1e12, mfu=peak and rate / peak)
