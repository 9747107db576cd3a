"""What distillation costs: the fused loss beside the naive one, and a co-distillation step beside its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.kernels.vocab_loss import api, reference
from llama4_jax.kernels.vocab_loss.comparison import KL, Comparison, Dense
from training.bench import spread, synthetic_batches
from training.config import Distillation, RunConfig
from training.loop import put_local
from training.mesh import check_fits, make_mesh, row_share
from training.state import TrainState, create_state
from training.step import forward, make_train_step


def bench_loss(
    tokens: int, vocabulary: int, width: int, teacher_width: int, comparison: Comparison = KL, repeats: int = 5
) -> dict[str, Any]:  # fmt: skip
    """Value and gradient of h CE + s D in fp32, fused and from whole logits, in turns: seconds each (`spread`), bytes
    of temporaries, and the ratios fused / naive of the median times and of the temporaries."""
    args = _inputs(tokens, vocabulary, width, teacher_width)
    forms = {"fused": api.vocab_loss, "naive": reference.vocab_loss}
    runs, temporaries = {}, {}
    for name, loss in forms.items():

        def total(h, w, labels, hard, soft, teacher, loss=loss):
            return loss(h, w, labels, hard, soft, teacher, comparison)[0]

        compiled: Any = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*args).compile()
        runs[name] = lambda compiled=compiled: compiled(*args)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    seconds = in_turns(runs, repeats)
    return dict(
        tokens=tokens, vocabulary=vocabulary, width=width, teacher_width=teacher_width, divergence=comparison.kind,
        measured=comparison.measure, seconds={name: spread(values) for name, values in seconds.items()},
        temporaries=temporaries, time_ratio=_ratio(seconds, "fused", "naive"),
        memory_ratio=temporaries["fused"] / temporaries["naive"],
    )  # fmt: skip


def bench_step_beside_parts(cfg: RunConfig, repeats: int = 5) -> dict[str, Any]:
    """A step of teachers and students beside the same work in programs of its own, in turns: each frozen teacher's
    forward pass, each learner's step on labels alone. `overhead`: median of step / sum of parts - 1, which holds the
    second head (the teacher's logits and the divergence) and what sharing a program costs or saves."""
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    batch = put_local(synthetic_batches(cfg, *row_share(mesh)[:2])[0], mesh)
    runs: dict[str, Callable[[], Any]] = {"together": _stepper(cfg, mesh, batch)}
    for name, learner in cfg.learners.items():
        if learner.optimizer is None:
            params = create_state(cfg, mesh).learners[name].params
            pass_forward = jax.jit(forward(learner, mesh))
            runs[f"{name}, forward"] = lambda f=pass_forward, params=params: f(params, batch)
        else:
            learner = replace(learner, distillation=Distillation())
            runs[f"{name}, labels alone"] = _stepper(replace(cfg, learners={name: learner}), mesh, batch)
    seconds = in_turns(runs, repeats)
    together = np.array(seconds["together"])
    parts = sum(np.array(values) for name, values in seconds.items() if name != "together")
    return dict(preset=cfg.name, batch=cfg.train.batch, seq_len=cfg.train.seq_len,
                seconds={name: spread(values) for name, values in seconds.items()},
                overhead=float(np.median(together / parts)) - 1)  # fmt: skip


def _stepper(cfg: RunConfig, mesh: Any, batch: Any) -> Callable[[], Any]:
    """A step from the state that the one before left."""
    step = make_train_step(cfg, mesh, domains=1)
    state: list[TrainState] = [create_state(cfg, mesh)]

    def run() -> Any:
        state[0], metrics = step(state[0], batch)
        return metrics

    return run


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, `repeats` times one after the other, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(seconds: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    return float(np.median(np.array(seconds[a]) / np.array(seconds[b])))


def _inputs(tokens: int, vocabulary: int, width: int, teacher_width: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    h_RD = jax.random.normal(keys[0], (tokens, width))
    w_DV = jax.random.normal(keys[1], (width, vocabulary)) / width**0.5
    hidden, unembedding = (jax.random.normal(keys[2], (tokens, teacher_width)),
                           jax.random.normal(keys[3], (teacher_width, vocabulary)) / teacher_width**0.5)  # fmt: skip
    labels_R = jax.random.randint(keys[4], (tokens,), 0, vocabulary, jnp.int32)
    half = jnp.full(tokens, 0.5)
    return h_RD, w_DV, labels_R, half, half, Dense(hidden, unembedding)
