"""The table of names and layouts, and the two configurations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from llama4_jax import hf
from llama4_jax.config import (
    MODELS,
    ModelConfig,
    Rope,
    VisionConfig,
    maverick,
    scout,
    tiny_maverick,
    tiny_scout,
    with_vision,
)
from llama4_jax.text import abstract

TINY = replace(tiny_maverick(), vocab_size=24, embed_dim=16, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=6,
               dense_dim=20, expert_dim=10, num_experts=3)  # fmt: skip


def shapes(cfg: ModelConfig) -> dict[hf.Path, tuple[int, ...]]:
    return {path: p.get_value().shape for path, p in nnx.to_flat_state(nnx.split(abstract(cfg))[1])}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_covers_every_weight_once(name):
    cfg = MODELS[name]()
    table = list(hf.tensors(cfg))
    assert len({t.name for t in table}) == len(table)
    ours = [(path, t.block) for t in table for path in t.paths]
    assert len(set(ours)) == len(ours)
    expected = {
        (path, block)
        for path, shape in shapes(cfg).items()
        for block in (range(shape[0]) if path[0] == "blocks" else [None])
    }
    assert set(ours) == expected
    assert sum(np.prod(t.shape, dtype=object) for t in table) == sum(
        np.prod(s, dtype=object) for s in shapes(cfg).values()
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.embed_tokens.weight", (202_048, 5120)),
        ("language_model.lm_head.weight", (202_048, 5120)),
        ("language_model.model.norm.weight", (5120,)),
        ("language_model.model.layers.47.input_layernorm.weight", (5120,)),
        ("language_model.model.layers.3.self_attn.q_proj.weight", (5120, 5120)),
        ("language_model.model.layers.3.self_attn.v_proj.weight", (1024, 5120)),
        ("language_model.model.layers.3.self_attn.o_proj.weight", (5120, 5120)),
        ("language_model.model.layers.46.feed_forward.down_proj.weight", (5120, 16_384)),
        ("language_model.model.layers.46.feed_forward.up_proj.weight", (16_384, 5120)),
        ("language_model.model.layers.47.feed_forward.router.weight", (128, 5120)),
        ("language_model.model.layers.47.feed_forward.shared_expert.gate_proj.weight", (8192, 5120)),
        ("language_model.model.layers.47.feed_forward.experts.gate_up_proj", (128, 5120, 16_384)),
        ("language_model.model.layers.47.feed_forward.experts.down_proj", (128, 8192, 5120)),
    ],
)
def test_names_and_shapes_of_maverick(name, shape):
    """As the published checkpoint has them."""
    assert {t.name: t.shape for t in hf.tensors(maverick(), hf.TEXT_PREFIX)}[name] == shape


def test_layouts_by_hand():
    table = {t.name.removeprefix("model.layers.5."): t for t in hf.tensors(TINY)}
    D, N, H, E, F = TINY.embed_dim, TINY.num_heads, TINY.head_dim, TINY.num_experts, TINY.expert_dim
    rng = np.random.default_rng(0)

    q = table["self_attn.q_proj.weight"]
    assert (q.paths, q.block) == ((("blocks", "layers", 1, "attention", "wq_DNH"),), 1)  # layer 5 of a period of 4
    wq_DNH = rng.standard_normal((D, N, H))
    x_D = rng.standard_normal(D)
    np.testing.assert_allclose(q.to_hf(wq_DNH) @ x_D, np.einsum("D,DNH->NH", x_D, wq_DNH).reshape(-1))

    o = table["self_attn.o_proj.weight"]
    wo_NHD, y_NH = rng.standard_normal((N, H, D)), rng.standard_normal((N, H))
    np.testing.assert_allclose(o.to_hf(wo_NHD) @ y_NH.reshape(-1), np.einsum("NH,NHD->D", y_NH, wo_NHD))

    gate_up = table["feed_forward.experts.gate_up_proj"]
    gate_EDF, up_EDF = rng.standard_normal((2, E, D, F))
    fused = gate_up.to_hf(gate_EDF, up_EDF)
    assert fused.shape == gate_up.shape == (E, D, 2 * F)
    np.testing.assert_array_equal(fused[:, :, :F], gate_EDF)  # gate first
    np.testing.assert_array_equal(fused[:, :, F:], up_EDF)
    assert [path[-1] for path in gate_up.paths] == ["wi_gate_EDF", "wi_up_EDF"]
    np.testing.assert_array_equal(gate_up.from_hf(fused[1:])[1], up_EDF[1:])  # some experts alone


def test_there_and_back_is_the_identity():
    rng = np.random.default_rng(0)
    for t in hf.tensors(TINY):
        theirs = rng.standard_normal(t.shape, np.float32)
        ours = t.from_hf(theirs)
        assert all(x.shape == t.our_shape for x in ours)
        np.testing.assert_array_equal(t.to_hf(*ours), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_configurations_go_there_and_back(name):
    cfg = MODELS[name]()
    back = hf.config_from_hf(hf.config_to_hf(cfg))
    rope = cfg.rope if cfg.rope.factor != 1 else Rope(theta=cfg.rope.theta)  # an unscaled one has no other numbers
    assert back == replace(cfg, rope=rope)


PUBLISHED_SCOUT = {  # the settings of the published Llama-4-Scout-17B-16E-Instruct
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
    "text_config": {
        "_attn_implementation_autoset": True,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": 4,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
}


def test_the_published_scout_is_our_scout():
    assert hf.config_from_hf(PUBLISHED_SCOUT) == with_vision(scout())
    assert hf.config_from_hf(PUBLISHED_SCOUT, vision=False) == scout()


def test_a_whole_configuration_goes_there_and_back():
    assert hf.config_from_hf(hf.config_to_hf(with_vision(scout()))) == with_vision(scout())
    with pytest.raises(ValueError, match=r"needs vision.mlp_dim \(64\) to be shuffle\^2 x embed_dim, which is 5632"):
        hf.config_to_hf(with_vision(scout(), VisionConfig(mlp_dim=64)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=None), "'image_size' is missing in vision_config"),
        (dict(projector_input_dim=5), "must be one width, not"),
        (dict(hidden_act="quick_gelu"), "hidden_act = 'quick_gelu' is not supported"),
        (dict(norm_eps=1e-6), "norm_eps = 1e-06 is not supported"),
        (dict(window=3), "'window' .* is not a setting this model knows"),
        (dict(image_size=337), "image_size .337. must be a multiple of patch_size x shuffle .28.: the nearest is 336"),
    ],
)
def test_settings_of_a_tower_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        hf.config_from_hf(PUBLISHED_SCOUT | dict(vision_config=PUBLISHED_SCOUT["vision_config"] | changes))


def test_rope_in_the_spelling_of_transformers_5():
    config = hf.config_to_hf(tiny_scout())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    assert hf.config_from_hf(config) == tiny_scout()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert hf.config_from_hf(config).rope == Rope(theta=5000.0)


def test_what_a_config_leaves_out_is_what_transformers_takes():
    config = hf.config_to_hf(tiny_scout())
    for name in ("moe_layers", "interleave_moe_layer_step", "no_rope_layers", "no_rope_layer_interval",
                 *hf.SETTINGS, "hidden_act", "rope_scaling", "rope_theta"):  # fmt: skip
        del config[name]
    cfg = hf.config_from_hf(config)
    assert (cfg.nope_every, cfg.moe_every, cfg.chunk, cfg.floor_scale, cfg.max_position) == (4, 1, 8192, 8192, 131_072)
    assert (cfg.qk_norm, cfg.temperature_tuning, cfg.attn_scale, cfg.norm_eps) == (True, True, 0.1, 1e-5)
    assert cfg.rope == Rope()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(hidden_size=None), "'hidden_size' is missing"),
        (dict(hidden_size="64"), "hidden_size must be a whole number, not '64'"),
        (dict(hidden_size=64.5), "hidden_size must be a whole number"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be a number"),
        (dict(use_qk_norm="yes"), "use_qk_norm must be true or false"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
        (dict(attention_bias=True), "attention_bias = True is not supported"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings = True is not supported"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config = .* is not supported"),
        (dict(sliding_window=4096), "'sliding_window' .* is not a setting this model knows"),
        (dict(auto_map={"AutoModel": "evil.Model"}), "'auto_map' .* is not a setting this model knows"),
        (dict(attention_chunk_size=None), "attention_chunk_size must be a whole number"),
        (dict(no_rope_layers=[1, 0, 1, 1]), "no_rope_layers = .* does not repeat regularly over 4 layers"),
        (dict(no_rope_layers=[1, 1, 1, 1]), "no_rope_layers = .* does not repeat regularly"),
        (dict(no_rope_layers=3), "no_rope_layers must be a list"),
        (dict(moe_layers=[0, 3]), "moe_layers = .* does not repeat regularly"),
        (dict(moe_layers=[]), "moe_layers = .* does not repeat regularly"),
        (dict(moe_layers=["a"]), "moe_layers = .* does not repeat regularly"),
        (dict(moe_layers=None, interleave_moe_layer_step=0), "interleave_moe_layer_step must be at least 1"),
        (dict(layer_types=["full_attention"] * 4), "layer_types = .* does not agree with no_rope_layers"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type 'yarn' is not supported"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "'low_freq_factor' is missing"),
        (dict(rope_scaling={"rope_type": "default", "beta": 4.0}), "'beta' in the RoPE scaling"),
        (dict(rope_scaling="llama3"), "rope_scaling must be a mapping"),
        (dict(num_attention_heads=3), "num_heads \\(3\\) must be a multiple of num_kv_heads"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        hf.config_from_hf(hf.config_to_hf(tiny_scout()) | changes)
    assert "\n" not in str(error.value)


def test_the_whole_model_is_checked_on_both_levels():
    with pytest.raises(ValueError, match="'audio_config'"):
        hf.config_from_hf(PUBLISHED_SCOUT | dict(audio_config={}))
    with pytest.raises(ValueError, match="model_type is None"):
        hf.config_from_hf(dict(model_type="llama4"))
    with pytest.raises(ValueError, match="'mystery'"):
        hf.config_from_hf(PUBLISHED_SCOUT | dict(text_config=PUBLISHED_SCOUT["text_config"] | dict(mystery=1)))
