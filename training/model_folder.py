"""What makes a folder of shards a model: configuration, tokenizer, index, manifest, and a card about its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from data import llama4_hf
from data.images import processor_files
from data.llama4_tokenizer import Llama4Tokenizer
from data.tokenizer import CONFIG_FILE, Tokenizer
from llama4_jax import hf
from llama4_jax.config import ModelConfig
from training import quantised
from training.safetensors_header import INDEX, index_text, read_json

CONFIG, GENERATION, MANIFEST, CARD = "config.json", "generation_config.json", "llama4_manifest.json", "README.md"
TEMPERATURE, TOP_P = 0.6, 0.9
"""As published with Llama 4."""


@dataclass(frozen=True)
class About:
    """What a folder says beside its weights."""

    tokenizer: Tokenizer | None = None
    card: str = ""


def write(
    work: epath.Path,
    cfg: ModelConfig,
    shards: Mapping[str, Sequence[tuple[str, str, tuple[int, ...]]]],
    dtype: str,
    about: About,
    manifest: Mapping[str, Any],
    quant: quantised.Scheme | None,
) -> None:
    """Tokenizer, card, index, manifest and configuration, in this order: with the last one the folder is complete."""
    tokenizer = about.tokenizer
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        stops = list(llama4_hf.STOPS) if isinstance(tokenizer, Llama4Tokenizer) else tokenizer.eos_id
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(work)
        if isinstance(tokenizer, Llama4Tokenizer):
            llama4_hf.write(tokenizer, work, images=cfg.vision is not None)
        _bound_length(work / CONFIG_FILE, cfg.max_position)
    generation = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, **ids}
    (work / GENERATION).write_text(json.dumps(generation, indent=2))
    if about.card:
        (work / CARD).write_text(about.card)
    (work / INDEX).write_text(index_text(shards))
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
    config = hf.config_to_hf(cfg)
    config.get("text_config", config).update(ids)
    config |= {**image_ids(cfg, tokenizer), "torch_dtype": dtype}
    if v := cfg.vision:
        for name, content in processor_files(v.image_size, v.patch_size, v.shuffle).items():
            (work / name).write_text(json.dumps(content, indent=2))
    if quant is not None:
        config["quantization_config"] = quant.config()
    (work / CONFIG).write_text(json.dumps(config, indent=2))


def image_ids(cfg: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, int]:
    """The ids of images in a whole model's config.json; without a tokenizer none, as Llama 4's are transformers' own.
    ValueError for a tokenizer without such tokens."""
    if cfg.vision is None or tokenizer is None:
        return {}
    if (ids := tokenizer.image_ids) is None:
        raise ValueError("export: the model has a vision tower, but its tokenizer has no special tokens for images")
    return {"boi_token_index": ids.start, "eoi_token_index": ids.end, "image_token_index": ids.patch}


def _bound_length(file: epath.Path, length: int) -> None:
    """A tokenizer's configuration says how much its model reads."""
    if file.exists():
        config = json.loads(file.read_text())
        file.write_text(json.dumps({"model_max_length": length, **config}, indent=1))


def read_config(folder: epath.PathLike, vision: bool = True) -> ModelConfig:
    """The model that a Hugging Face folder holds; without `vision` the text part of one with a tower."""
    return hf.config_from_hf(read_json(epath.Path(folder) / CONFIG), vision)


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
    """The manifest that an export wrote, empty where there is none; ValueError for one without the tensors' digests."""
    file = epath.Path(folder) / MANIFEST
    if not file.exists():
        return {}
    manifest = read_json(file, 100_000_000)
    if not isinstance(manifest.get("sha256"), dict):
        raise ValueError(f"{file} has no digests of tensors ('sha256'): it is not what was exported")
    return manifest


def stop_ids(folder: epath.PathLike) -> tuple[int, ...]:
    """The ids that end what the folder's model writes, by its generation configuration, else its configuration."""
    for name in (GENERATION, CONFIG):
        if (epath.Path(folder) / name).exists():
            stops = read_json(epath.Path(folder) / name).get("eos_token_id")
            if isinstance(stops, int) and not isinstance(stops, bool):
                return (stops,)
            if isinstance(stops, list) and stops and all(type(stop) is int for stop in stops):
                return tuple(stops)
    return ()
