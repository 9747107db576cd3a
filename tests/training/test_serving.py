"""What serving needs, against what arrays and folders really hold."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llama4_jax.config import maverick, scout, tiny_scout
from llama4_jax.generate import cache_bytes, empty_caches
from llama4_jax.text import Transformer
from training.config import MeshConfig
from training.export_params import save_hf
from training.flops import forward
from training.serving import serving

ONE = dict(batch=1, piece=8192, mesh=MeshConfig())


def test_int4_scout_fits_one_h100_with_its_cache():
    """107.8B parameters: 4.5 bits for each that is quantised, 16 for the rest; 128K tokens of cache beside them."""
    found = serving(scout(), "h100:1x1", "int4-g32", [131_072], **ONE)
    (need,) = found["needs"]
    cfg = scout()
    tables = 2 * cfg.vocab_size * cfg.embed_dim
    kept = tables + cfg.num_layers * (cfg.embed_dim * cfg.num_experts + 2 * cfg.embed_dim) + cfg.embed_dim
    attention = cfg.embed_dim * cfg.head_dim * 2 * (cfg.num_heads + cfg.num_kv_heads)
    experts = 3 * cfg.embed_dim * cfg.expert_dim * (cfg.num_experts + 1)
    matrices = cfg.num_layers * (4 + 3 * (cfg.num_experts + 1))
    packed = cfg.num_layers * (attention + experts) * 4.5 / 8 + 16 * matrices  # and two int64, the shape, of each
    assert found["weights"] == packed + 2 * kept
    assert need["fits"] and need["cache"] == cache_bytes(cfg, 1, 131_072)
    assert need["total"] < 0.92 * 80e9 < serving(cfg, "h100:1x1", "int8", [8192], **ONE)["weights"]
    assert 131_072 <= found["longest"] < 262_144


def test_caches_are_shared_over_context_and_heads():
    contexts = [1_048_576, 10_485_760]
    alone = serving(scout(), "h100:2x8", "bfloat16", contexts, **ONE)
    shared = serving(scout(), "h100:2x8", "bfloat16", contexts, **ONE | dict(mesh=MeshConfig(context=16)))
    for before, after, context in zip(alone["needs"], shared["needs"], contexts, strict=True):
        chunk = 2 * 8 * 128 * 2 * 36 * 8192  # of the 36 local layers, on every device
        assert after["cache"] - chunk == (before["cache"] - chunk) / 16
        assert after["cache"] == cache_bytes(scout(), 1, context, context=16)
        assert after["decode"] < before["decode"] and after["prefill"] == before["prefill"]
    assert not alone["needs"][1]["fits"] and shared["needs"][1]["fits"] and shared["longest"] == 10_485_760
    heads = serving(scout(), "h100:2x8", "bfloat16", contexts, **ONE | dict(mesh=MeshConfig(tensor=8)))
    assert heads["needs"][0]["cache"] == alone["needs"][0]["cache"] / 8
    with pytest.raises(ValueError, match=r"mesh.tensor \(16\) must divide the 8 kv heads"):
        serving(scout(), "h100:2x8", "bfloat16", contexts, **ONE | dict(mesh=MeshConfig(tensor=16)))


def test_times_are_bytes_and_flops_over_the_data_sheet():
    cfg, (need,) = maverick(), serving(maverick(), "h100:4x8", "bfloat16", [8192], **ONE)["needs"]
    parts = forward(cfg, 8192)
    assert need["prefill"] == pytest.approx(8192 * (sum(parts.values()) - parts["head"]) / 32 / 989e12, rel=1e-3)
    # A token visits one of 128 experts in each MoE layer: 14B weights or so of 400B, without the embedding.
    active = sum(flops for part, flops in forward(cfg, 1).items() if not part.startswith("attention")) // 2
    read = 3350e9 * need["decode"] - need["cache"]
    routers = cfg.num_moe_layers * cfg.embed_dim * cfg.num_experts
    assert read * 32 == pytest.approx(2 * active, rel=1e-3) and routers < active
    more = serving(cfg, "h100:4x8", "bfloat16", [8192], **ONE | dict(batch=10**4))["needs"][0]
    assert (3350e9 * more["decode"] - more["cache"]) * 32 == pytest.approx(2 * 400.7e9, rel=0.01)


def test_weights_and_caches_are_what_there_is(tmp_path):
    cfg = replace(tiny_scout(), num_layers=2, nope_every=2, vocab_size=64)
    save_hf(nnx.split(Transformer(cfg, nnx.Rngs(0)))[1], cfg, tmp_path / "hf")
    found = serving(cfg, "h100:1x1", "bfloat16", [cfg.chunk], **ONE)
    stored = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert 0 < stored - found["weights"] < 10_000  # headers
    caches = jax.eval_shape(lambda: empty_caches(cfg, 1, cfg.chunk, jnp.bfloat16))
    assert found["needs"][0]["cache"] == sum(2 * x.size for x in jax.tree.leaves(caches))
