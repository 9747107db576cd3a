"""The vision part of `llama4_jax/hf.py`: names and layouts of the tower, and its settings."""

from __future__ import annotations

from typing import Any

from llama4_jax.config import VisionConfig

PREFIX = "vision_model."
# The columns are those of `llama4_jax/hf.py`.
OUTSIDE = (
    ("embedder.patch_CD", f"{PREFIX}patch_embedding.linear.weight", "D C"),
    ("embedder.class_D", f"{PREFIX}class_embedding", "D"),
    ("embedder.positions_PD", f"{PREFIX}positional_embedding_vlm", "P D"),
    ("embedder.norm.scale_D", f"{PREFIX}layernorm_pre.weight", "D"),
    ("embedder.norm.bias_D", f"{PREFIX}layernorm_pre.bias", "D"),
    ("final_norm.scale_D", f"{PREFIX}layernorm_post.weight", "D"),
    ("final_norm.bias_D", f"{PREFIX}layernorm_post.bias", "D"),
    ("adapter.fc1_WA", f"{PREFIX}vision_adapter.mlp.fc1.weight", "A W"),
    ("adapter.fc2_AO", f"{PREFIX}vision_adapter.mlp.fc2.weight", "O A"),
    ("projector.kernel_OU", "multi_modal_projector.linear_1.weight", "U O"),
)
LAYER = (
    ("attention_norm.scale_D", "input_layernorm.weight", "D"),
    ("attention_norm.bias_D", "input_layernorm.bias", "D"),
    ("wq_DNH", "self_attn.q_proj.weight", "NH D"),
    ("wk_DNH", "self_attn.k_proj.weight", "NH D"),
    ("wv_DNH", "self_attn.v_proj.weight", "NH D"),
    ("wo_NHD", "self_attn.o_proj.weight", "D NH"),
    ("bq_Q", "self_attn.q_proj.bias", "Q"),
    ("bk_Q", "self_attn.k_proj.bias", "Q"),
    ("bv_Q", "self_attn.v_proj.bias", "Q"),
    ("bo_D", "self_attn.o_proj.bias", "D"),
    ("mlp_norm.scale_D", "post_attention_layernorm.weight", "D"),
    ("mlp_norm.bias_D", "post_attention_layernorm.bias", "D"),
    ("fc1_DF", "mlp.fc1.weight", "F D"),
    ("fc1_bias_F", "mlp.fc1.bias", "F"),
    ("fc2_FD", "mlp.fc2.weight", "D F"),
    ("fc2_bias_D", "mlp.fc2.bias", "D"),
)

SIZES = {  # Hugging Face's name -> ours; a config.json must state them, as transformers' defaults are no model's
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
ADAPTER = frozenset({"projector_input_dim", "projector_output_dim", "vision_output_dim"})
"""Ours is one width, `adapter_dim`."""
SETTINGS: dict[str, tuple[str, Any]] = {"initializer_range": ("init_std", 0.02)}
FIXED = {  # what the tower does in one way only
    "hidden_act": "gelu",
    "num_channels": 3,
    "norm_eps": 1e-5,  # transformers' layer norms have this whatever it says
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -1,
    "multi_modal_projector_bias": False,
    "projector_dropout": 0.0,
    "attention_dropout": 0.0,
}


def check(cfg: VisionConfig) -> None:
    """ValueError for a tower that transformers' class cannot be: its adapter reads `intermediate_size` values."""
    merged = cfg.shuffle**2 * cfg.embed_dim
    if cfg.mlp_dim != merged:
        raise ValueError(f"Hugging Face's Llama 4 needs vision.mlp_dim ({cfg.mlp_dim}) to be shuffle^2 x embed_dim, "
                         f"which is {merged}")  # fmt: skip


def config_to_hf(cfg: VisionConfig) -> dict[str, Any]:
    """The vision_config of a config.json."""
    check(cfg)
    return {
        "model_type": "llama4_vision_model",
        **{name: getattr(cfg, ours) for name, ours in SIZES.items()},
        **{name: getattr(cfg, ours) for name, (ours, _) in SETTINGS.items()},
        **dict.fromkeys(sorted(ADAPTER), cfg.adapter_dim),
        **{name: value for name, value in FIXED.items() if name != "vision_feature_layer"},
        "pixel_shuffle_ratio": 1 / cfg.shuffle,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
    }
