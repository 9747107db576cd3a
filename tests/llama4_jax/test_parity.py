"""The model is transformers' Llama4ForCausalLM: logits of random weights, against golden files and live.

Sequences run over several chunks and several steps of the temperature, in a batch of two; norms' scales are not one.
The golden files hold what transformers computed (`tools/record_golden.py`), for machines without it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import ModelConfig
from llama4_jax.text import abstract
from tools.record_golden import (
    CASES,
    GOLDEN,
    STRIDE,
    our_state,
    random_tokens,
    random_weights,
    transformers_logits,
)

TOLERANCE = 1e-5  # of max |a - b| / max |b|
MARGIN = 1e-4  # rounding cannot move a token to another expert


@cache
def our_logits(cfg: ModelConfig, weights_of: ModelConfig) -> np.ndarray:
    """fp32 logits [B, T, V] of the model `cfg` on the weights drawn for `weights_of`."""
    graphdef = nnx.split(abstract(cfg))[0]
    state = our_state(weights_of, random_weights(weights_of))
    logits = jax.jit(lambda state, ids_BT: nnx.merge(graphdef, state).logits(ids_BT))
    return np.asarray(logits(state, random_tokens(cfg)))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden_ones(name):
    with np.load(GOLDEN) as golden:
        theirs, margin = golden[name], golden[f"{name}.margin"]
    assert margin > MARGIN
    assert relative_error(our_logits(CASES[name], CASES[name])[:, ::STRIDE], theirs) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    pytest.importorskip("torch", reason="the live comparison needs the extra [verify]")
    pytest.importorskip("transformers", reason="the live comparison needs the extra [verify]")
    cfg = CASES[name]
    theirs, margin = transformers_logits(cfg, random_weights(cfg), random_tokens(cfg))
    assert margin > MARGIN
    assert relative_error(our_logits(cfg, cfg), theirs) < TOLERANCE
    with np.load(GOLDEN) as golden:  # the golden file is of this code and these seeds
        assert relative_error(golden[name], theirs[:, ::STRIDE]) < TOLERANCE


CHANGES = {
    "chunk": dict(chunk=9),
    "floor_scale": dict(floor_scale=6),
    "attn_scale": dict(attn_scale=0.11),
    "qk_norm": dict(qk_norm=False),
    "rope": dict(rope=replace(CASES["scout"].rope, factor=8.0)),
    "norm_eps": dict(norm_eps=1e-3),
    "experts_per_token": dict(experts_per_token=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_comparison_sees_each_setting(change):
    """The sequences are long enough and the weights large enough for a wrong setting to show."""
    cfg = CASES["scout"]
    with np.load(GOLDEN) as golden:
        theirs = golden["scout"]
    assert relative_error(our_logits(replace(cfg, **CHANGES[change]), cfg)[:, ::STRIDE], theirs) > 100 * TOLERANCE
