"""The vision tower, and early fusion with the text model, are those of transformers, on random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax import hf
from llama4_jax.axes import Execution
from llama4_jax.config import ModelConfig, VisionConfig, scout, with_vision
from llama4_jax.text import abstract
from llama4_jax.vision import merge_patches, patch_angles, to_patches
from tools.record_golden import CASES, our_state, random_weights

TOLERANCE = 1e-5  # of max |a - b| / max |b|
TOWER = VisionConfig(embed_dim=32, num_layers=3, num_heads=4, mlp_dim=128, image_size=24, patch_size=4, adapter_dim=20)
TOWERS = {
    "plain": TOWER,
    "wide_heads_odd_grid_of_tokens": replace(TOWER, num_heads=2, image_size=40, patch_size=4, num_layers=2),
    "shuffle_3": replace(TOWER, shuffle=3, mlp_dim=9 * 32, image_size=36, patch_size=6, adapter_dim=48),
    "theta_six_heads": replace(TOWER, rope_theta=100.0, embed_dim=48, mlp_dim=192, num_heads=6),
}
PATCH = 7
"""The token of the tests' vocabulary whose embedding a tile's tokens replace."""


def whole(tower: VisionConfig, text: str = "scout") -> ModelConfig:
    return with_vision(CASES[text], tower)


def random_tiles(tower: VisionConfig, *count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (*count, tower.image_size, tower.image_size, 3), np.uint8)


@cache
def weights(cfg: ModelConfig) -> dict[str, np.ndarray]:
    return random_weights(cfg)


@cache
def theirs(cfg: ModelConfig) -> Any:
    """transformers' whole model on these weights, in fp32."""
    torch = pytest.importorskip("torch", reason="the live comparison needs the extra [verify]")
    transformers = pytest.importorskip("transformers", reason="the live comparison needs the extra [verify]")
    settings = {**hf.config_to_hf(cfg), "image_token_index": PATCH}
    settings["text_config"] = {**settings["text_config"], "pad_token_id": None}
    config = transformers.Llama4Config.from_dict(settings)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    config.vision_config._attn_implementation = "eager"
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights(cfg).items()}, strict=True)
    return model


def pixels(tiles: np.ndarray) -> Any:
    """As transformers takes them: colours first, -1 to 1."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(tiles.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_parameters_at_the_published_size():
    flat = nnx.to_flat_state(nnx.split(abstract(with_vision(scout())))[1])
    sizes = {path: math.prod(p.get_value().shape) for path, p in flat}
    assert sum(n for path, n in sizes.items() if path[0] == "vision") == 871_932_416
    assert sum(sizes.values()) == 108_641_793_536
    assert VisionConfig().tile_tokens == 144


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_equals_transformers(name):
    cfg = whole(TOWERS[name])
    tiles = random_tiles(TOWERS[name], 3)
    model = theirs(cfg)
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        features = model.vision_model(pixels(tiles)).last_hidden_state
        expected = model.multi_modal_projector(features).numpy()
    graphdef = nnx.split(abstract(cfg))[0]
    run = jax.jit(lambda state, tiles: nnx.merge(graphdef, state).vision(tiles, Execution()))
    ours = run(our_state(cfg, weights(cfg)), tiles)
    assert ours.shape == (3, TOWERS[name].tile_tokens, cfg.embed_dim)
    assert relative_error(ours, expected) < TOLERANCE


def fused_rows(tower: VisionConfig, tiles_of_rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and slots [B, T]: text, and in each row images of so many tiles, text between them."""
    rng, M = np.random.default_rng(3), tower.tile_tokens
    tokens = rng.integers(PATCH + 1, 64, (len(tiles_of_rows), length), np.int32)
    slots = np.full_like(tokens, -1)
    for row, images in enumerate(tiles_of_rows):
        at, tile = 2, 0
        for count in images:
            for _ in range(count):
                slots[row, at : at + M] = tile * M + np.arange(M)
                at, tile = at + M + 1, tile + 1
            at += 3
        assert at < length
    return np.where(slots >= 0, PATCH, tokens), slots


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "scout"),
        ("theta_six_heads", "maverick"),
        pytest.param("plain", "top2_qk_norm_chunk16", marks=pytest.mark.slow),
    ],
)
def test_the_whole_model_equals_transformers(name, text):
    """Rows with images of 1, 3 and 5 tiles, of none, and of two images, in sequences of several chunks."""
    tower = TOWERS[name]
    cfg = whole(tower, text)
    images = [[1], [3, 1], [], [5]]
    tokens_BT, slots_BT = fused_rows(tower, images, 70)
    tiles_BJ = random_tiles(tower, len(images), 5)
    model = theirs(cfg)
    import torch  # pyright: ignore[reportMissingImports]

    used = np.concatenate([tiles_BJ[row, : sum(counts)] for row, counts in enumerate(images)])
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BT).long(), pixel_values=pixels(used), use_cache=False).logits.numpy()
    graphdef = nnx.split(abstract(cfg))[0]
    run = jax.jit(lambda state, *x: nnx.merge(graphdef, state).logits(x[0], tiles_BJ=x[1], slots_BT=x[2]))
    ours = run(our_state(cfg, weights(cfg)), tokens_BT, tiles_BJ, slots_BT)
    assert relative_error(ours, expected) < 1e-4


def test_text_alone_is_the_text_model():
    """A tower changes neither the text model's weights nor, where there is no image, its output."""
    cfg, tower = whole(TOWER), nnx.split(abstract(whole(TOWER)))[0]
    tokens_BT, slots_BT = fused_rows(TOWER, [[], []], 20)
    state, text = our_state(cfg, weights(cfg)), nnx.split(abstract(CASES["scout"]))[0]
    flat = [(path, p) for path, p in nnx.to_flat_state(state) if path[0] != "vision"]
    plain = jax.jit(lambda state, tokens: nnx.merge(text, state).logits(tokens))(nnx.from_flat_state(flat), tokens_BT)
    run = jax.jit(lambda state, tokens, *x: nnx.merge(tower, state).logits(tokens, tiles_BJ=x[0], slots_BT=x[1]))
    fused = run(state, tokens_BT, random_tiles(TOWER, 2, 1), slots_BT)
    np.testing.assert_allclose(fused, plain, atol=1e-5)


def test_tiles_without_a_tower_are_refused():
    text, tiles, none = abstract(CASES["scout"]), random_tiles(TOWER, 1, 1), np.zeros((1, 8), np.int32)
    with pytest.raises(ValueError, match="need a model with a vision tower"):
        nnx.eval_shape(lambda tiles, tokens: text.logits(tokens, tiles_BJ=tiles, slots_BT=tokens), tiles, none)


def test_patches_angles_and_merging_by_hand():
    tiles = random_tiles(TOWER, 1)
    patches = np.asarray(to_patches(TOWER, jnp.asarray(tiles)))
    block = tiles[0, 4:8, 8:12].astype(np.float32) / 127.5 - 1  # row 1, column 2 of a grid of 6
    np.testing.assert_allclose(patches[0, 6 + 2], block.transpose(2, 0, 1).reshape(-1), atol=1e-6)
    angles = patch_angles(TOWER)
    assert angles.shape == (37, 4) and not angles[-1].any()
    np.testing.assert_allclose(angles[6 + 2], [3, 3 * 0.01, 2, 2 * 0.01], rtol=1e-6)
    numbers = np.arange(36, dtype=np.float32)[None, :, None] * np.ones((1, 1, 32), np.float32)
    merged = np.asarray(merge_patches(TOWER, jnp.asarray(numbers)))
    assert merged[0, 4, ::32].tolist() == [14, 15, 20, 21]  # token (1, 1) is of patches (2, 2) to (3, 3)
