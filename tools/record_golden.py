"""Record what transformers computes for small random Llama 4 models: `python -m tools.record_golden`.

Writes tests/golden/parity.npz: for every case some rows of the fp32 logits of `Llama4ForCausalLM` (eager attention,
CPU) and the smallest router margin. The weights are not stored: they are drawn from numpy's generator by the same
code here and in tests/llama4_jax/test_parity.py. Needs the extra [verify].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from llama4_jax import hf
from llama4_jax.config import ModelConfig, Rope
from llama4_jax.text import abstract
from training.verify import router_margin

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "parity.npz"
BATCH, TOKENS = 2, 44  # over 5.5 chunks of 8, or 2.75 of 16
STRIDE = 3  # every third position is stored

SMALL = ModelConfig(vocab_size=64, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, dense_dim=48,
                    expert_dim=24, num_experts=4, chunk=8, floor_scale=5, max_position=256)  # fmt: skip
SCALED = Rope(theta=10_000.0, factor=16.0, low=1.0, high=1.0, original=32)  # Scout's: no middle band
BANDED = Rope(theta=10_000.0, factor=8.0, low=1.0, high=4.0, original=32)  # Llama 3's
PLAIN = Rope(theta=10_000.0)

CASES = {
    "scout": replace(SMALL, rope=SCALED),
    "scout_two_blocks_banded_rope": replace(SMALL, num_layers=8, num_heads=6, head_dim=8, rope=BANDED),
    "maverick": replace(SMALL, num_experts=8, moe_every=2, qk_norm=False, rope=PLAIN),
    "top2_qk_norm_chunk16": replace(SMALL, chunk=16, experts_per_token=2, moe_every=2, rope=PLAIN),
    "every_third_no_temperature": replace(
        SMALL, num_layers=6, num_kv_heads=1, nope_every=3, moe_every=2, temperature_tuning=False, rope=BANDED
    ),
}


def random_weights(cfg: ModelConfig, seed: int = 7) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names and layouts: matrices that keep the scale, norms away from one.

    With the default seed no token of any case lies nearer than 7e-4 (relative) between two experts.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for t in hf.tensors(cfg):
        x = rng.standard_normal(t.shape, dtype=np.float32)
        if len(t.shape) == 1:
            x = 1 + np.float32(0.3) * x
        elif t.name != "model.embed_tokens.weight":
            fan_in = t.shape[1]  # of [out, in] and of the experts' [E, in, out]
            x *= np.float32(fan_in**-0.5)
        weights[t.name] = x
    return weights


def our_state(cfg: ModelConfig, weights: dict[str, np.ndarray]) -> nnx.State:
    """The same weights as the state of `Transformer(cfg)`, on the host."""
    state = nnx.split(abstract(cfg))[1]
    flat = {path: np.zeros(p.get_value().shape, np.float32) for path, p in nnx.to_flat_state(state)}
    for t in hf.tensors(cfg):
        for path, x in zip(t.paths, t.from_hf(weights[t.name]), strict=True):
            flat[path][... if t.block is None else t.block] = x
    return nnx.from_flat_state([(path, p.replace(flat[path])) for path, p in nnx.to_flat_state(state)])


def random_tokens(cfg: ModelConfig, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (BATCH, TOKENS), dtype=np.int32)


def transformers_logits(
    cfg: ModelConfig, weights: dict[str, np.ndarray], ids_BT: np.ndarray
) -> tuple[np.ndarray, float]:
    """Logits [B, T, V] of transformers on these weights, and the smallest relative router margin."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Llama4ForCausalLM, Llama4TextConfig  # pyright: ignore[reportMissingImports]

    config = Llama4TextConfig.from_dict({**hf.config_to_hf(cfg), "pad_token_id": None})
    config._attn_implementation = "eager"
    model: Any = Llama4ForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=True)
    with torch.no_grad():
        out = model(torch.from_numpy(ids_BT).long(), use_cache=False, output_router_logits=True)
    return out.logits.numpy(), min(router_margin(z_RE.numpy(), cfg.experts_per_token) for z_RE in out.router_logits)


def main() -> None:
    record: dict[str, Any] = {}
    for name, cfg in CASES.items():
        logits_BTV, margin = transformers_logits(cfg, random_weights(cfg), random_tokens(cfg))
        record[name] = logits_BTV[:, ::STRIDE]
        record[f"{name}.margin"] = np.float32(margin)
        print(f"{name}: largest logit {np.abs(logits_BTV).max():.2f}, router margin {margin:.1e}")
    np.savez_compressed(GOLDEN, **record)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
