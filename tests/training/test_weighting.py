"""Weights of soft and hard targets: each policy by hand, its running means, and what the competence gate is deaf to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from training import weighting
from training.config import Distillation
from training.weighting import DOMAINS, FOCUSES, SUMMED, Weighting

FLAT = Distillation("t", schedule="constant", soft=0.8)


def mix(cfg: Distillation, state: Weighting | None = None, step: int = 0, steps: int = 11, rate: float = 1.0):
    return weighting.weights(cfg, state or weighting.init(), jnp.float32(rate), 2.0, jnp.int32(step), steps)


def sums(**given: Any) -> dict:
    """Of two domains, with ten tokens each; zeros where nothing is given."""
    zero = {name: np.zeros(2, np.float32) for name in (*SUMMED, "divergence")}
    return zero | {"tokens": np.float32([10, 10])} | {name: np.float32(x) for name, x in given.items()}


def after(cfg: Distillation, *of_steps: dict, steps: int = 100) -> Weighting:
    state = weighting.init()
    for step, one in enumerate(of_steps):
        state = weighting.update(cfg, state, one, jnp.int32(step), steps)
    return state


@pytest.mark.parametrize(
    "schedule, at_start, midway, at_end",
    [("constant", 0.8, 0.8, 0.8), ("linear", 0.8, 0.45, 0.1), ("cosine", 0.8, 0.45, 0.1), ("wsd", 0.4, 0.4, 0.4)],
)
def test_schedules(schedule, at_start, midway, at_end):
    cfg = replace(FLAT, schedule=schedule, soft_end=0.1)
    for step, want in ((0, at_start), (5, midway), (10, at_end)):
        found = mix(cfg, step=step)
        np.testing.assert_allclose(found.soft, want, rtol=1e-6)
        np.testing.assert_allclose(found.hard, 1 - want, rtol=1e-6)
        np.testing.assert_allclose(mix(replace(cfg, hard="one"), step=step).hard, 1)
    assert found.soft.shape == found.hard.shape == (DOMAINS,) and found.toward is None


def test_running_means_forget_and_domains_without_tokens_keep_theirs():
    cfg = replace(FLAT, ema=0.5, weighting="confidence")
    state = after(cfg, sums(focus=[2, 8]), sums(tokens=[10, 0], focus=[6, 0]))
    np.testing.assert_allclose(state.focus[:2], [0.5 * 1 + 0.5 * 6, 4])
    np.testing.assert_allclose(state.tokens[:2], [0.5 * 5 + 0.5 * 10, 5])
    assert not state.focus[2:].any()


@pytest.mark.parametrize("name", FOCUSES)
def test_a_focus_is_divided_by_its_mean(name):
    """So that soft targets weigh as much in all as under the schedule; not more than `most` times, on any token."""
    cfg = replace(FLAT, weighting=name)
    assert weighting.comparison(cfg).focus == name
    np.testing.assert_allclose(mix(cfg).soft, 0.8)  # nothing known yet: by g itself
    np.testing.assert_allclose(mix(cfg, after(cfg, sums(focus=[2, 8]))).soft, 0.8 / 0.5, rtol=1e-6)
    np.testing.assert_allclose(mix(cfg, after(cfg, sums(focus=[0.1, 0.1]))).soft, 0.8 * cfg.most, rtol=1e-6)
    np.testing.assert_allclose(mix(cfg, after(cfg, sums(focus=[2, 8]))).hard, 0.2, rtol=1e-6)


def test_gradients_are_balanced_within_limits():
    cfg = replace(FLAT, weighting="gradient_norm")
    for hard, soft, factor in ((8, 4, 2), (4, 8, 0.5), (80, 1, 4), (1, 80, 0.25)):
        state = after(cfg, sums(hard_norm=[hard, hard], soft_norm=[soft, soft]))
        np.testing.assert_allclose(mix(cfg, state).soft, 0.8 * factor, rtol=1e-6)
    np.testing.assert_allclose(mix(cfg).soft, 0.8)


def test_the_gate_opens_by_domain_and_only_unseen_tokens_move_it():
    """A teacher that is better in the first domain and worse in the second; then rows come again, and the student knows
    them by heart. The control takes its means over all tokens and shuts the gate on a teacher that is still better."""
    cfg = replace(FLAT, weighting="competence", ema=0.9, sharpness=20.0, margin=0.05)
    fresh = sums(unseen=[10, 10], unseen_ce=[30, 30], unseen_teacher_ce=[20, 40])
    again = sums(tokens=[10, 10])  # nothing unseen among them
    fooled = sums(unseen=[10, 10], unseen_ce=[5, 5], unseen_teacher_ce=[20, 40])
    gate = mix(cfg, after(cfg, fresh, *[again] * 50)).soft[:3]
    np.testing.assert_allclose(gate, 0.8 / (1 + np.exp([-20 * 0.95, 20 * 1.05, 20 * 0.05])), rtol=1e-5)
    np.testing.assert_allclose(mix(cfg, after(cfg, fresh, *[again] * 50)).hard[:3], 1 - gate, rtol=1e-6)
    assert mix(cfg, after(cfg, fresh, *[fooled] * 50)).soft[0] < 1e-3


def test_taid_rises_to_the_teacher_faster_while_it_helps():
    cfg = replace(FLAT, taid_start=0.4, taid_rate=0.05)
    assert mix(cfg).toward == np.float32(0.4)

    def path(divergences):
        return [float(mix(cfg, after(cfg, *[sums(divergence=[d, d]) for d in divergences[:n]])).toward)
                for n in range(1, len(divergences) + 1)]  # fmt: skip

    falling, rising = path(np.geomspace(10, 1, 20)), path(np.geomspace(1, 10, 20))
    line = 0.4 + 0.6 * np.arange(1, 21) / 100
    assert (np.diff(falling) > 0).all() and (np.array(falling) >= line - 1e-6).all() and falling[-1] > rising[-1]
    last = after(cfg, *[sums(divergence=[1, 1])] * 5, steps=5)
    assert mix(cfg, last).toward == pytest.approx(1)
