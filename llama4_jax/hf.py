"""The one table of names and layouts between this tree and Hugging Face's, and the two configurations.

Hugging Face's side is `Llama4ForCausalLM` of `transformers`, or the text part of `Llama4ForConditionalGeneration`,
whose names carry the prefix `language_model.`. Nothing here knows of files (`training/export.py` does).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flax import nnx

from llama4_jax import hf_vision
from llama4_jax.config import ModelConfig, Rope, VisionConfig
from llama4_jax.text import abstract

# Each row: our weight, Hugging Face's name, Hugging Face's layout. The letters are the house's (axes.py) and ours
# stand behind the weight's last underscore, so wq_DNH and "NH D" say: transpose D to the end, join N and H.
# "gate + up": ours are two weights, theirs one, joined along the last dimension, ours in this order.
TOP = (
    ("embedding.table_VD", "model.embed_tokens.weight", "V D"),
    ("final_norm.scale_D", "model.norm.weight", "D"),
    ("unembedding.kernel_DV", "lm_head.weight", "V D"),
)
LAYER = (
    ("attention_norm.scale_D", "input_layernorm.weight", "D"),
    ("attention.wq_DNH", "self_attn.q_proj.weight", "NH D"),
    ("attention.wk_DKH", "self_attn.k_proj.weight", "KH D"),
    ("attention.wv_DKH", "self_attn.v_proj.weight", "KH D"),
    ("attention.wo_NHD", "self_attn.o_proj.weight", "D NH"),
    ("ffn_norm.scale_D", "post_attention_layernorm.weight", "D"),
)
DENSE = (
    ("ffn.wi_gate_DF", "feed_forward.gate_proj.weight", "F D"),
    ("ffn.wi_up_DF", "feed_forward.up_proj.weight", "F D"),
    ("ffn.wo_FD", "feed_forward.down_proj.weight", "D F"),
)
MOE = (
    ("ffn.router_DE", "feed_forward.router.weight", "E D"),
    ("ffn.shared.wi_gate_DF", "feed_forward.shared_expert.gate_proj.weight", "F D"),
    ("ffn.shared.wi_up_DF", "feed_forward.shared_expert.up_proj.weight", "F D"),
    ("ffn.shared.wo_FD", "feed_forward.shared_expert.down_proj.weight", "D F"),
    ("ffn.experts.wi_gate_EDF + ffn.experts.wi_up_EDF", "feed_forward.experts.gate_up_proj", "E D F"),
    ("ffn.experts.wo_EFD", "feed_forward.experts.down_proj", "E F D"),
)
# In place of the two rows of fused experts, in quantised releases: {e} is the expert, one of ours a tensor of theirs.
EXPERT = (
    ("ffn.experts.wi_gate_EDF", "feed_forward.experts.{e}.gate_proj.weight", "F D"),
    ("ffn.experts.wi_up_EDF", "feed_forward.experts.{e}.up_proj.weight", "F D"),
    ("ffn.experts.wo_EFD", "feed_forward.experts.{e}.down_proj.weight", "D F"),
)

TEXT_PREFIX = "language_model."
"""In front of every name of the text part in a checkpoint of the whole model."""
OTHER_PARTS = ("vision_model.", "multi_modal_projector.")
"""Parts of the whole model that the text model does not hold."""
ROUTER_BIAS = "bias_E"
"""The one weight of ours that Hugging Face's model has not. Where it is 0 the models are the same."""

Path = tuple[Any, ...]
"""A weight in the flat state: names, and numbers of layers within a block."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of Hugging Face's, and where its numbers stand in our state."""

    name: str
    """Hugging Face's name."""
    paths: tuple[Path, ...]
    """Our weights, as paths in the flat state; more than one where theirs is fused."""
    block: int | None
    """The row of our stacked weights; None for a weight outside the layers."""
    groups: tuple[str, ...]
    """Hugging Face's dimensions, each the letters it joins."""
    sizes: Mapping[str, int] = field(repr=False)
    """Size of each letter."""
    expert: int | None = None
    """The one expert of ours that it holds; None where it holds all, or none."""

    @property
    def index(self) -> tuple[int, ...]:
        """Where in our stacked weight it stands."""
        return tuple(i for i in (self.block, self.expert) if i is not None)

    @property
    def letters(self) -> str:
        """Our layout of what stands there."""
        return str(self.paths[0][-1]).rsplit("_", 1)[1][0 if self.expert is None else 1 :]

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face's shape."""
        shape = [int(np.prod([self.sizes[letter] for letter in group])) for group in self.groups]
        return (*shape[:-1], shape[-1] * len(self.paths))

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of ours."""
        return tuple(self.sizes[letter] for letter in self.letters)

    def theirs(self, ranges: Mapping[str, tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """For each of our weights, the box of their tensor that holds these (first, last) of our letters.

        A letter that is missing is whole; one behind another in a group must be.
        """
        box: list[tuple[int, int]] = []
        for group in self.groups:
            inner = math.prod(self.sizes[letter] for letter in group[1:])
            first, last = ranges.get(group[0], (0, self.sizes[group[0]]))
            box.append((first * inner, last * inner))
        width = self.shape[-1] // len(self.paths)
        return [[*box[:-1], (i * width + box[-1][0], i * width + box[-1][1])] for i in range(len(self.paths))]

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """A box of their tensor that belongs to one of our weights (`theirs`) -> that weight's (a view)."""
        sizes: list[int] = []
        for n, group in zip(theirs.shape, self.groups, strict=True):
            rest = [self.sizes[letter] for letter in group[1:]]
            sizes += [n // math.prod(rest), *rest]
        layout = "".join(self.groups)
        return theirs.reshape(sizes).transpose([layout.index(letter) for letter in self.letters])

    def to_hf(self, *ours: np.ndarray) -> np.ndarray:
        """One layer's weights of ours -> Hugging Face's tensor."""
        order = [self.letters.index(letter) for letter in "".join(self.groups)]
        shape = self.shape[:-1]
        parts = [x.transpose(order).reshape(*shape, self.shape[-1] // len(ours)) for x in ours]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def from_hf(self, theirs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hugging Face's tensor -> one layer's weights of ours (views)."""
        return tuple(self.ours(x) for x in np.split(theirs, len(self.paths), axis=-1))


def tensors(cfg: ModelConfig, prefix: str = "", per_expert: bool = False) -> Iterator[Tensor]:
    """Every tensor of Hugging Face's model, in the order of the forward pass; `prefix`: of a text model's names;
    `per_expert`: as `EXPERT` has it.

    A model with a vision tower is theirs of text and vision together, whose text part always has its prefix.
    """
    prefix = TEXT_PREFIX if cfg.vision else prefix
    shapes = {path: p.get_value().shape for path, p in nnx.to_flat_state(nnx.split(abstract(cfg))[1])}
    moe = (*MOE[:-2], *EXPERT) if per_expert else MOE

    def tensor(
        row: tuple[str, str, str], ours: Path, theirs: str, block: int | None, expert: int | None = None
    ) -> Tensor:
        weights, name, layout = row
        paths = tuple((*ours, *weight.split(".")) for weight in weights.split(" + "))
        shape = shapes[paths[0]] if block is None else shapes[paths[0]][1:]
        sizes = dict(zip(str(paths[0][-1]).rsplit("_", 1)[1], shape, strict=True))
        name = f"{'' if ours[:1] == ('vision',) else prefix}{theirs}{name.format(e=expert)}"
        return Tensor(name, paths, block, tuple(layout.split()), sizes, expert)

    if cfg.vision:
        for row in hf_vision.OUTSIDE:
            yield tensor(row, ("vision",), "", None)
        for layer in range(cfg.vision.num_layers):
            for row in hf_vision.LAYER:
                yield tensor(row, ("vision", "layers"), f"{hf_vision.PREFIX}model.layers.{layer}.", layer)
    embedding, final_norm, unembedding = TOP
    yield tensor(embedding, (), "", None)
    for layer in range(cfg.num_layers):
        block, i = divmod(layer, cfg.period)
        for row in LAYER + (moe if cfg.pattern[i].moe else DENSE):
            if "{e}" not in row[1]:
                yield tensor(row, ("blocks", "layers", i), f"model.layers.{layer}.", block)
        for expert in range(cfg.num_experts if per_expert and cfg.pattern[i].moe else 0):
            for row in EXPERT:
                yield tensor(row, ("blocks", "layers", i), f"model.layers.{layer}.", block, expert)
    yield tensor(final_norm, (), "", None)
    yield tensor(unembedding, (), "", None)


# --- configuration -------------------------------------------------------------------------------------------------

SIZES = {  # Hugging Face's name -> ours; a config.json must state them
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "expert_dim",
    "intermediate_size_mlp": "dense_dim",
    "num_local_experts": "num_experts",
}
SETTINGS: dict[str, tuple[str, Any]] = {  # Hugging Face's name -> ours, and what transformers takes where it is missing
    "num_experts_per_tok": ("experts_per_token", 1),
    "attention_chunk_size": ("chunk", 8192),
    "use_qk_norm": ("qk_norm", True),
    "attn_temperature_tuning": ("temperature_tuning", True),
    "attn_scale": ("attn_scale", 0.1),
    "floor_scale": ("floor_scale", 8192),
    "rms_norm_eps": ("norm_eps", 1e-5),
    "max_position_embeddings": ("max_position", 131_072),
    "initializer_range": ("init_std", 0.02),
}
FIXED = {  # what the model does in one way only
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
}
QUANT_METHOD = "compressed-tensors"
"""The one form of quantised weights that is read and written (`training/quantised.py`)."""
PATTERN = frozenset({"moe_layers", "interleave_moe_layer_step", "no_rope_layers", "no_rope_layer_interval",
                     "layer_types", "rope_theta", "rope_scaling", "rope_parameters"})  # fmt: skip
# What does not change the forward pass.
IGNORED = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "for_llm_compressor", "id2label", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "problem_type", "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
WHOLE_MODEL = frozenset({"text_config", "vision_config", "image_token_index", "boi_token_index", "eoi_token_index"})


def is_whole_model(config: Mapping[str, Any]) -> bool:
    """Whether this config.json describes text and vision together (`llama4`) rather than text (`llama4_text`)."""
    kind = config.get("model_type")
    if kind not in ("llama4", "llama4_text"):
        raise ValueError(f"config.json: model_type is {kind!r}; what can be read is 'llama4_text' or 'llama4'")
    return kind == "llama4"


def config_from_hf(config: Mapping[str, Any], vision: bool = True) -> ModelConfig:
    """A config.json, of the text model or of the whole one, as a ModelConfig; `vision`: with the tower of a whole one.

    Raises ValueError naming the setting that is missing, unknown, or not what this model does.
    """
    tower: VisionConfig | None = None
    if is_whole_model(config):
        _check_known(config, WHOLE_MODEL)
        whole, config = config, _section(config, "text_config")
        if is_whole_model(config):
            raise ValueError("config.json: text_config must be of model_type 'llama4_text'")
        tower = _vision(_section(whole, "vision_config")) if vision else None
    _check_known(config, PATTERN | SIZES.keys() | SETTINGS.keys())
    if missing := [name for name in SIZES if config.get(name) is None]:
        raise ValueError(f"config.json: {missing[0]!r} is missing")
    values: dict[str, Any] = {ours: _typed(name, config[name], 1) for name, ours in SIZES.items()}
    for name, (ours, default) in SETTINGS.items():
        values[ours] = _typed(name, config.get(name, default), default)
    nope_every, moe_every = _pattern(config, values["num_layers"])
    return ModelConfig(**values, nope_every=nope_every, moe_every=moe_every, rope=_rope(config), vision=tower)


def _vision(config: Mapping[str, Any]) -> VisionConfig:
    """The vision_config of a whole model."""
    known = hf_vision.SIZES.keys() | hf_vision.SETTINGS.keys() | hf_vision.ADAPTER | {"rope_parameters", "rope_theta"}
    _check_known(config, known | {"pixel_shuffle_ratio"}, hf_vision.FIXED)
    if missing := [name for name in (*hf_vision.SIZES, *hf_vision.ADAPTER) if config.get(name) is None]:
        raise ValueError(f"config.json: {missing[0]!r} is missing in vision_config")
    values: dict[str, Any] = {ours: _typed(name, config[name], 1) for name, ours in hf_vision.SIZES.items()}
    for name, (ours, default) in hf_vision.SETTINGS.items():
        values[ours] = _typed(name, config.get(name, default), default)
    widths = sorted({_typed(name, config[name], 1) for name in hf_vision.ADAPTER})
    if len(widths) > 1:
        raise ValueError(f"config.json: {', '.join(sorted(hf_vision.ADAPTER))} must be one width, not {widths}")
    ratio = _typed("pixel_shuffle_ratio", config.get("pixel_shuffle_ratio", 0.5), 1.0)
    theta = _section(config, "rope_parameters").get("rope_theta", config.get("rope_theta", 10_000.0))
    cfg = VisionConfig(**values, adapter_dim=widths[0], shuffle=round(1 / ratio) if ratio > 0 else 0,
                       rope_theta=_typed("rope_theta", theta, 1.0))  # fmt: skip
    hf_vision.check(cfg)
    return cfg


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of `Llama4ForCausalLM`, or of `Llama4ForConditionalGeneration` where there is a vision tower, in
    the spelling that every version of transformers with Llama 4 reads; without ids of tokens."""
    if cfg.vision:
        text = config_to_hf(replace(cfg, vision=None))
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": text,
            "vision_config": hf_vision.config_to_hf(cfg.vision),
            "tie_word_embeddings": False,
        }
    rope, scaling = cfg.rope, None
    if rope.factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low,
            "high_freq_factor": rope.high,
            "original_max_position_embeddings": rope.original,
        }
    kinds = [cfg.pattern[layer % cfg.period] for layer in range(cfg.num_layers)]
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **{name: getattr(cfg, ours) for name, ours in SIZES.items()},
        **{name: getattr(cfg, ours) for name, (ours, _) in SETTINGS.items()},
        "interleave_moe_layer_step": cfg.moe_every,
        "moe_layers": [layer for layer, kind in enumerate(kinds) if kind.moe],
        "no_rope_layer_interval": cfg.nope_every,
        "no_rope_layers": [int(kind.local) for kind in kinds],  # theirs is 1 where there *is* RoPE
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {name} must be a mapping, not {value!r}")
    return value


def _check_known(config: Mapping[str, Any], known: AbstractSet[str], fixed: Mapping[str, Any] = FIXED) -> None:
    for name, value in config.items():
        if name == "quantization_config":
            if value is not None and not (isinstance(value, dict) and value.get("quant_method") == QUANT_METHOD):
                raise ValueError(f"config.json: {name} = {value!r} is not supported, only null and {QUANT_METHOD}'s")
        elif name in fixed:
            if value != fixed[name]:
                raise ValueError(f"config.json: {name} = {value!r} is not supported, only {fixed[name]!r}")
        elif name not in known and name not in IGNORED:
            raise ValueError(f"config.json: {name!r} (= {value!r}) is not a setting this model knows")


def _typed(name: str, value: Any, like: Any) -> Any:
    """`value` in the type of `like`; early configs hold an integer for attn_temperature_tuning."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(like, bool):
        if isinstance(value, int):
            return bool(value)
    elif number and (isinstance(like, float) or value == int(value)):
        return type(like)(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(like)]
    raise ValueError(f"config.json: {name} must be {kind}, not {value!r}")


def _pattern(config: Mapping[str, Any], num_layers: int) -> tuple[int, int]:
    """(nope_every, moe_every) of the lists or, where there are none, of the steps; a list must be regular."""

    def step(name: str, default: int) -> int:
        value = _typed(name, config.get(name, default), 1)
        if value < 1:
            raise ValueError(f"config.json: {name} must be at least 1, not {value}")
        return value

    def every(name: str, layers: list) -> int:
        step = layers[0] + 1 if layers and isinstance(layers[0], int) else 0
        if step < 1 or layers != list(range(step - 1, num_layers, step)):
            raise ValueError(
                f"config.json: {name} = {config[name]!r} does not repeat regularly over {num_layers} layers"
            )
        return step

    def listed(name: str) -> list | None:
        if not isinstance(value := config.get(name), list | None):
            raise ValueError(f"config.json: {name} must be a list, not {value!r}")
        return value

    if rope_layers := listed("no_rope_layers"):  # transformers reads an empty list as none given; 1 is *with* RoPE
        nope_every = every("no_rope_layers", [n for n, rope in enumerate(rope_layers[:num_layers]) if not rope])
    else:
        nope_every = step("no_rope_layer_interval", 4)
    if (moe_layers := listed("moe_layers")) is not None:
        moe_every = every("moe_layers", moe_layers)
    else:
        moe_every = step("interleave_moe_layer_step", 1)
    kinds = ["chunked_attention" if (n + 1) % nope_every else "full_attention" for n in range(num_layers)]
    if listed("layer_types") not in (None, kinds):
        raise ValueError(f"config.json: layer_types = {config['layer_types']!r} does not agree with no_rope_layers")
    return nope_every, moe_every


def _rope(config: Mapping[str, Any]) -> Rope:
    """RoPE from `rope_theta` and `rope_scaling`, or from the `rope_parameters` of transformers 5."""
    given = _section(config, "rope_scaling") or _section(config, "rope_parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    names = {"factor": ("factor", 1.0), "low_freq_factor": ("low", 1.0), "high_freq_factor": ("high", 1.0),
             "original_max_position_embeddings": ("original", 1)}  # fmt: skip
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    if unknown := given.keys() - names.keys() - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"config.json: {min(unknown)!r} in the RoPE scaling is not a setting this model knows")
    theta = _typed("rope_theta", given.get("rope_theta", config.get("rope_theta", 500_000.0)), 1.0)
    if kind == "default":
        if ignored := given.keys() & names.keys():
            raise ValueError(f"config.json: RoPE scaling has {min(ignored)!r} but not the rope_type 'llama3'")
        return Rope(theta=theta)
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"config.json: {missing[0]!r} is missing in the RoPE scaling")
    return Rope(theta=theta, **{ours: _typed(name, given[name], like) for name, (ours, like) in names.items()})
