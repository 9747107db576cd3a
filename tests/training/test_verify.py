"""Verification: both oracles agree with the model, see what differs, and say what they compared."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import ModelConfig, Rope
from tools.record_golden import our_state, random_weights
from training import verify as module
from training.export import save_hf
from training.verify import Verification, router_margin, verify

SCOUT = ModelConfig(vocab_size=64, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=48,
                    expert_dim=16, num_experts=4, chunk=8, floor_scale=5, max_position=256,
                    rope=Rope(10_000.0, 16.0, original=32))  # fmt: skip
MAVERICK = replace(SCOUT, moe_every=2, qk_norm=False, experts_per_token=2, rope=Rope(10_000.0, 8.0, 1.0, 4.0, 32))
HAS_EXTRA = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
AGAINST = [
    "numpy",
    pytest.param("transformers", marks=pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra [verify]")),
]


def params(cfg: ModelConfig) -> nnx.State:
    return jax.tree.map(jax.numpy.asarray, our_state(cfg, random_weights(cfg)))


@pytest.fixture(scope="module", params=[SCOUT, MAVERICK], ids=["scout", "maverick"])
def model(request, tmp_path_factory) -> tuple[ModelConfig, Path]:
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(params(request.param), request.param, folder)
    return request.param, folder


@pytest.mark.parametrize("against", AGAINST)
def test_the_export_computes_the_same(model, against):
    result = verify(model[1], tolerance=1e-5, against=against)
    assert result.ok and result.router_margin > 1e-4, str(result)
    assert (result.against, result.dtype, result.tokens, result.chunks) == (against, "bfloat16", 28, 4)


@pytest.mark.parametrize("against", AGAINST)
def test_a_difference_is_seen(model, against, monkeypatch):
    cfg, folder = model
    monkeypatch.setattr(module, "load_hf", lambda folder: params(cfg))  # the weights before they were rounded to bf16
    result = verify(folder, against=against)
    assert not result.ok and result.max_relative_error > 1e-3


def test_router_margin_by_hand():
    logits_RE = np.array([[4.0, 1.0, 2.0], [0.0, -0.5, -8.0]])
    assert router_margin(logits_RE, 1) == 0.5 / 8
    assert router_margin(logits_RE, 2) == 1.0 / 8
    assert router_margin(logits_RE, 3) == np.inf


def test_the_verdict():
    def result(error: float, margin: float) -> Verification:
        return Verification("numpy", error, margin, tolerance=1e-4, dtype="bfloat16", tokens=28, chunks=4)

    assert result(1e-6, 1e-9).ok and not result(1e-6, 1e-9).undecided  # no token changed its expert: they agree
    assert not result(0.1, 1e-9).ok and result(0.1, 1e-9).undecided
    assert not result(0.1, 1e-2).ok and not result(0.1, 1e-2).undecided
    assert not result(float("nan"), 1e-2).ok
    assert str(result(0.1, 1e-9)).startswith("undecided") and "another seed" in str(result(0.1, 1e-9))
    assert str(result(0.1, 1e-2)).startswith("NOT EQUAL to numpy")


def test_without_transformers_the_extra_and_the_oracle_are_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"\[verify\], or compare --against numpy"):
        verify(model[1])
