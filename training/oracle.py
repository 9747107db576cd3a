"""Llama 4's text model in NumPy, as published, straight from a Hugging Face folder: an oracle for `verify`.

Written for one purpose, to be checked by eye against the published description: Hugging Face's names and layouts,
fp32, whole matrices of scores, one loop over experts, nothing shared with the model library. Tests hold it equal to
transformers. Shapes carry the house letters (`llama4_jax/axes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def stages(
    config: dict[str, Any], weight: Callable[[str], np.ndarray], ids_BT: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, residual stream [B, T, D], the router's logits [rows, E] where there is one) behind the embedding, each
    layer and the final norm, of whole documents, one a row.

    `config`: the text part of config.json; `weight(name)`: a tensor in fp32.
    """
    c, eps = config, config["rms_norm_eps"]
    x_BTD = weight("model.embed_tokens.weight")[ids_BT]
    yield "embedding", x_BTD, None
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        w: Callable[[str], np.ndarray] = lambda part, name=name: weight(name + part)  # noqa: E731
        h_BTD = _norm(x_BTD, eps) * w("input_layernorm.weight")
        x_BTD = x_BTD + _attention(c, w, h_BTD, local=bool(c["no_rope_layers"][layer]))
        h_BTD = _norm(x_BTD, eps) * w("post_attention_layernorm.weight")
        router_RE = None
        if layer in c["moe_layers"]:
            y_BTD, router_RE = _moe(c, w, h_BTD)
        else:
            y_BTD = _swiglu(h_BTD, *(w(f"feed_forward.{p}_proj.weight").T for p in ("gate", "up", "down")))
        x_BTD = x_BTD + y_BTD
        yield f"layer {layer}", x_BTD, router_RE
    yield "final norm", _norm(x_BTD, eps) * weight("model.norm.weight"), None


def _norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))


def _swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def _attention(c: dict[str, Any], w: Callable[[str], np.ndarray], x_BTD: np.ndarray, local: bool) -> np.ndarray:
    B, T, _ = x_BTD.shape
    H, position = c["head_dim"], np.arange(T)
    q, k, v = ((x_BTD @ w(f"self_attn.{p}_proj.weight").T).reshape(B, T, -1, H) for p in "qkv")
    visible = position[:, None] >= position[None, :]
    if local:
        q, k = _rotate(c, q), _rotate(c, k)
        if c["use_qk_norm"]:
            q, k = _norm(q, c["rms_norm_eps"]), _norm(k, c["rms_norm_eps"])
        chunk = position // c["attention_chunk_size"]
        visible &= chunk[:, None] == chunk[None, :]
    elif c["attn_temperature_tuning"]:
        steps = np.floor((position + 1) / c["floor_scale"])
        q = q * (1 + c["attn_scale"] * np.log1p(steps)).astype(np.float32)[None, :, None, None]
    out = np.empty_like(q)
    for head in range(q.shape[2]):
        shared = head // (q.shape[2] // k.shape[2])
        scores = q[:, :, head] @ k[:, :, shared].swapaxes(1, 2) / np.sqrt(np.float32(H))
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, :, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, :, shared]
    return out.reshape(B, T, -1) @ w("self_attn.o_proj.weight").T


def _rotate(c: dict[str, Any], x_BTNH: np.ndarray) -> np.ndarray:
    """Pairs (x_2i, x_2i+1) as complex numbers, turned by position times frequency."""
    frequency = c["rope_theta"] ** (-np.arange(0, c["head_dim"], 2) / c["head_dim"])
    if scaling := c.get("rope_scaling"):
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)  # within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.where(turns > high, 1.0, 0.0) if low == high else np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = (np.arange(x_BTNH.shape[1])[:, None] * frequency).astype(np.float32)
    turned = (x_BTNH[..., 0::2] + 1j * x_BTNH[..., 1::2]) * np.exp(1j * angle)[None, :, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_BTNH.shape).astype(np.float32)


def _moe(c: dict[str, Any], w: Callable[[str], np.ndarray], x_BTD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shared expert plus, for each chosen expert, Expert(sigmoid(z) x)."""
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    z_RE = x_RD @ w("feed_forward.router.weight").T
    y_RD = _swiglu(x_RD, *(w(f"feed_forward.shared_expert.{p}_proj.weight").T for p in ("gate", "up", "down")))
    chosen_RA = np.argsort(-z_RE, axis=1, kind="stable")[:, : c["num_experts_per_tok"]]
    gate_up_EDF, down_EFD = w("feed_forward.experts.gate_up_proj"), w("feed_forward.experts.down_proj")
    for expert in range(z_RE.shape[1]):
        rows = np.flatnonzero((chosen_RA == expert).any(axis=1))
        gate, up = np.split(gate_up_EDF[expert], 2, axis=1)
        scale = 1 / (1 + np.exp(-z_RE[rows, expert]))
        y_RD[rows] += _swiglu(x_RD[rows] * scale[:, None], gate, up, down_EFD[expert])
    return y_RD.reshape(x_BTD.shape), z_RE
