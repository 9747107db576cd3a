"""How much soft and hard targets weigh, step by step: pure functions of running means, which the checkpoint keeps.

A step's weights come from its number, its learning rate and the means of the steps before it, never from the batch
itself; only a token's own focus g (`kernels/vocab_loss/comparison.py`) is of the token. No weight knows a label: if h_i
depended on the label y_i, E_y[h(y) (q - e_y)] would pull the student away from the data's distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from llama4_jax.kernels.vocab_loss.comparison import Comparison
from training.config import Distillation

DOMAINS = 256
"""Domains that the means have room for."""
FOCUSES: Final = ("confidence", "student_entropy", "disagreement")


class Weighting(NamedTuple):
    """Running sums and counts of a student, fp32, by domain [DOMAINS]: a mean is their ratio. Zeros at the start."""

    tokens: Any  # with a target
    focus: Any  # of g
    hard_norm: Any  # of |q - y|
    soft_norm: Any  # of |t^2 dD/dz|
    unseen: Any  # tokens with a target of documents not seen before
    unseen_ce: Any  # on them, the student's
    unseen_teacher_ce: Any
    toward: Any  # [], t of TAID less its start
    momentum: Any  # [], running mean of the relative fall of D
    divergence: Any  # [], D of the step before; 0 before the first


SUMMED = Weighting._fields[:7]


class Mix(NamedTuple):
    """The weights of a step: of labels and of soft targets by domain, and how far the target is the teacher's."""

    hard: Any  # [DOMAINS]
    soft: Any  # [DOMAINS]
    toward: Any  # [], or None


def init() -> Weighting:
    """Nothing known."""
    zeros = {name: jnp.zeros(DOMAINS if name in SUMMED else (), jnp.float32) for name in Weighting._fields}
    return Weighting(**zeros)


def comparison(cfg: Distillation) -> Comparison:
    """What the loss compares, and by which factor of its own a token's soft target weighs; with every statistic."""
    focus = cfg.weighting if cfg.weighting in FOCUSES else "none"
    return Comparison(cfg.divergence, cfg.skew, cfg.temperature, focus, measure=True)


def scheduled(cfg: Distillation, rate: Any, peak: float, step: Any, steps: int) -> jax.Array:
    """a of a step, counted from 0: constant at `soft`, from there to `soft_end` linearly or along half a cosine over
    the run, or `soft` times the learning rate's share of its peak (WSD-alpha: Peng et al., arXiv 2410.16215)."""
    if cfg.schedule == "wsd":
        return jnp.float32(cfg.soft) * rate / peak
    done = jnp.float32(step) / max(steps - 1, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[cfg.schedule]
    return jnp.float32(cfg.soft_end + (cfg.soft - cfg.soft_end) * left)


def weights(cfg: Distillation, state: Weighting, rate: Any, peak: float, step: Any, steps: int) -> Mix:
    """(h, s) of a step by domain, with a the schedule's weight and E[.] running means.

    - schedule:       s = a
    - confidence, student_entropy, disagreement: s_i = a g_i / max(E[g], 1/most), over tokens of all domains
    - gradient_norm:  s = a clip(E|q - y| / E|t^2 dD/dz|, 1/most, most), over tokens of all domains
    - competence:     s_d = a sigmoid(sharpness (E_d CE_student - E_d CE_teacher - margin)), of domain d and over tokens
                      not seen before: on repeated ones the student's CE falls by memory

    h is 1, or with `hard` rest what the soft weight leaves: 1 - s_d under schedule and competence, else 1 - a.
    """
    a = scheduled(cfg, rate, peak, step, steps)
    soft = jnp.full(DOMAINS, a, jnp.float32)
    rest = 1 - soft
    if cfg.weighting in FOCUSES:
        soft /= jnp.maximum(_mean(state.focus.sum(), state.tokens.sum(), 1.0), 1 / cfg.most)
    elif cfg.weighting == "gradient_norm":
        balance = _mean(state.hard_norm.sum(), state.soft_norm.sum(), 1.0)
        soft *= jnp.clip(balance, 1 / cfg.most, cfg.most)
    elif cfg.weighting == "competence":
        lead = _mean(state.unseen_ce - state.unseen_teacher_ce, state.unseen, 0.0)
        soft *= jax.nn.sigmoid(cfg.sharpness * (lead - cfg.margin))
        rest = 1 - soft
    toward = cfg.taid_start + state.toward if cfg.taid_start < 1 else None
    return Mix(jnp.ones(DOMAINS) if cfg.hard == "one" else rest, soft, toward)


def update(cfg: Distillation, state: Weighting, sums: Mapping[str, Any], step: Any, steps: int) -> Weighting:
    """The state after a step whose sums by domain are `objectives.Sums.by_domain`; a domain without tokens keeps its
    means. TAID's t rises by rate x sigmoid(momentum) (1 - t), and at least linearly to 1 over the run."""
    new = {}
    for names in (SUMMED[:4], SUMMED[4:]):
        seen = sums[names[0]] > 0
        for name in names:
            before = getattr(state, name)
            after = cfg.ema * before[: len(seen)] + (1 - cfg.ema) * sums[name]
            new[name] = before.at[: len(seen)].set(jnp.where(seen, after, before[: len(seen)]))
    d = sums["divergence"].sum() / jnp.maximum(sums["tokens"].sum(), 1)
    fall = jnp.where(state.divergence > 0, (state.divergence - d) / (state.divergence + 1e-15), 0.0)
    momentum = 0.99 * state.momentum + 0.01 * fall
    t = cfg.taid_start + state.toward
    linear = cfg.taid_start + (1 - cfg.taid_start) * (jnp.float32(step) + 1) / steps
    t = jnp.clip(jnp.maximum(t + cfg.taid_rate * jax.nn.sigmoid(momentum) * (1 - t), linear), 0, 1)
    return Weighting(**new, toward=t - cfg.taid_start, momentum=momentum, divergence=d)


def _mean(total: jax.Array, count: jax.Array, nothing: float) -> jax.Array:
    """The running mean, or `nothing` before there is one."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), nothing)
