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
from training.export_params import save_hf
from training.layerwise import Ours
from training.verify import Verification, router_margin, starts_at_ties, verify
from training.weights import FolderWeights

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
    exact = {path: np.asarray(p.get_value()) for path, p in nnx.to_flat_state(params(cfg))}

    class Exact(FolderWeights):  # before they were rounded to bf16: from layer 2 on
        def read(self, path, index=(), ranges={}):  # noqa: B006
            if path[0] == "blocks" and path[2] >= 2:
                return exact[path][index]
            return super().read(path, index, ranges)

    monkeypatch.setattr(module, "Ours", lambda weights: Ours(Exact(folder)))
    lines: list[str] = []
    result = verify(folder, against=against, say=lines.append)
    assert not result.ok and result.max_relative_error > 1e-3
    assert [name for name, _ in result.stages] == ["embedding", *(f"layer {n}" for n in range(4)), "final norm"]
    assert result.first_beyond == "layer 2" and "first beyond it at layer 2" in str(result)
    assert len(lines) == 6 and lines[0].startswith("embedding: max |a - b| / max |b| = 0.00e+00")


def test_router_margin_by_hand():
    logits_RE = np.array([[4.0, 1.0, 2.0], [0.0, -0.5, -8.0]])
    assert router_margin(logits_RE, 1) == 0.5 / 8
    assert router_margin(logits_RE, 2) == 1.0 / 8
    assert router_margin(logits_RE, 3) == np.inf


def test_the_verdict():
    def result(error: float, near_tie: bool) -> Verification:
        return Verification("numpy", error, 1e-9, 1e-4, "bfloat16", tokens=28, chunks=4, near_tie=near_tie)

    assert result(1e-6, True).ok and not result(1e-6, True).undecided  # no token changed its expert: they agree
    assert not result(0.1, True).ok and result(0.1, True).undecided
    assert not result(0.1, False).ok and not result(0.1, False).undecided
    assert not result(float("nan"), False).ok
    assert str(result(0.1, True)).startswith("undecided") and "another seed" in str(result(0.1, True))
    assert str(result(0.1, False)).startswith("NOT EQUAL to numpy")


def test_a_near_tie_excuses_only_what_comes_after_it():
    error_BT, margin_BT = np.zeros((2, 6)), np.ones((2, 6))
    margin_BT[0, 3] = 0.0
    error_BT[0, 3:] = 1.0
    assert starts_at_ties(error_BT, margin_BT, 1e-4)
    error_BT[0, 2] = 1.0
    assert not starts_at_ties(error_BT, margin_BT, 1e-4)
    error_BT[0, 2], error_BT[1, 5] = 0.0, np.nan  # a row without a tie, and NaN differs
    assert not starts_at_ties(error_BT, margin_BT, 1e-4)


def test_without_transformers_the_extra_and_the_oracle_are_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"\[verify\], or compare --against numpy"):
        verify(model[1])
