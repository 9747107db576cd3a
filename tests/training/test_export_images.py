"""The whole multimodal checkpoint goes out to transformers and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from data.hf_tokenizer import HFTokenizer
from data.tokenizer import SentencePieceTokenizer, train_bpe
from llama4_jax import hf
from llama4_jax.config import VisionConfig, with_vision
from llama4_jax.text import abstract
from tools.record_golden import CASES, our_state, random_weights
from tools.record_images import write_tokenizer
from training.export_params import save_hf
from training.hf_import import load_hf
from training.model_folder import read_config
from training.verify import verify

TOWER = VisionConfig(embed_dim=32, num_layers=2, num_heads=4, mlp_dim=128, image_size=24, patch_size=4, adapter_dim=20)
TEXT = replace(CASES["scout"], vocab_size=272)  # as many as the tokenizer has
CFG = with_vision(TEXT, TOWER)


@cache
def params() -> nnx.State:
    return jax.tree.map(jax.numpy.asarray, our_state(CFG, random_weights(CFG)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers", reason="tokenizer.json files need the extra [hf-tokenizers]")
    folder = tmp_path_factory.mktemp("whole")
    write_tokenizer(folder)
    tokenizer = HFTokenizer(*((folder / f"tokenizer{x}.json").read_bytes() for x in ("", "_config")))
    save_hf(params(), CFG, folder / "hf", dtype="float32", tokenizer=tokenizer)
    return folder / "hf"


def test_the_folder_says_what_transformers_needs(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForConditionalGeneration"]
    ids = HFTokenizer(*((exported / f"tokenizer{x}.json").read_bytes() for x in ("", "_config"))).image_ids
    assert ids and (config["boi_token_index"], config["eoi_token_index"], config["image_token_index"]) == (
        ids.start, ids.end, ids.patch,
    )  # fmt: skip
    assert config["text_config"]["bos_token_id"] is not None
    size = json.loads((exported / "preprocessor_config.json").read_text())["size"]
    assert size == dict(height=24, width=24)
    assert json.loads((exported / "processor_config.json").read_text())["patch_size"] == 4
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {t.name for t in hf.tensors(CFG)}


def test_it_comes_back_whole_and_as_text_alone(exported):
    assert read_config(exported) == CFG
    assert read_config(exported, vision=False) == TEXT
    ours, back = params(), load_hf(exported)
    assert jax.tree.structure(back) == jax.tree.structure(nnx.split(abstract(CFG))[1])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)
    text = load_hf(exported, vision=False)
    assert jax.tree.structure(text) == jax.tree.structure(nnx.split(abstract(TEXT))[1])


def test_a_tokenizer_without_images_is_refused(tmp_path):
    plain = SentencePieceTokenizer(train_bpe([f"a few words of text, number {n}" for n in range(300)], 320))
    with pytest.raises(ValueError, match="its tokenizer has no special tokens for images"):
        save_hf(params(), CFG, tmp_path / "hf", tokenizer=plain)
    assert not (tmp_path / "hf").exists()


def test_transformers_loads_it_and_agrees(exported):
    """No tensor missing or left over; text and what the tower makes of tiles are equal (`verify` compares both)."""
    pytest.importorskip("torch", reason="the live comparison needs the extra [verify]")
    transformers = pytest.importorskip("transformers", reason="the live comparison needs the extra [verify]")
    _, info = transformers.Llama4ForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    found = verify(exported, tokens=20, batch=1)
    assert found.ok and found.tiles == 3, str(found)
