"""An exported model writes the same greedy text in transformers, across many chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data.tokenizer import SentencePieceTokenizer, train_bpe
from llama4_jax.config import ModelConfig, Rope
from llama4_jax.generate import generate
from tools.record_golden import our_state, random_weights
from training.export_params import save_hf
from training.load import load_model

NEW, CHUNK = 256, 48
SCOUT = ModelConfig(vocab_size=512, embed_dim=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, dense_dim=96,
                    expert_dim=64, num_experts=4, chunk=CHUNK, floor_scale=40, max_position=1024,
                    rope=Rope(10_000.0, 16.0, original=64))  # fmt: skip
MODELS = {
    "scout": SCOUT,
    "maverick": replace(SCOUT, num_experts=8, moe_every=2, qk_norm=False, rope=Rope(10_000.0)),
    "behemoth": replace(SCOUT, embed_dim=96, num_heads=6, expert_dim=96),
}
PROMPTS = (1, 47, 100)
"""Lengths: from the first token on, just before a chunk's end, and over two chunks."""


@pytest.fixture
def torch():
    """On one thread: for steps of one token, which threads spend waiting for each other."""
    torch = pytest.importorskip("torch", reason="needs the extra [verify]")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_transformers_own(name: str, tmp_path: Path, torch: Any):
    """256 tokens from each prompt, in fp32, over five or six chunk boundaries each. Ties cannot decide: along the whole
    path the likeliest token leads the next by far more than the two implementations' logits differ."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [verify]")
    cfg = MODELS[name]
    tokenizer = SentencePieceTokenizer(train_bpe([f"a few words of text, number {n}" for n in range(300)], 320))
    params = jax.tree.map(jax.numpy.asarray, our_state(cfg, random_weights(cfg)))
    save_hf(params, cfg, tmp_path / "hf", dtype="float32", tokenizer=tokenizer)
    ours = load_model(str(tmp_path / "hf")).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(0)
    for length in PROMPTS:
        prompt = [tokenizer.bos_id, *rng.integers(3, cfg.vocab_size, length - 1).tolist()]
        (new,) = generate(ours, [prompt], NEW, temperature=0.0)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=-1,
                temperature=None, top_p=None,
            )  # fmt: skip
            whole = theirs(torch.tensor([prompt + new[:-1]])).logits[0, length - 1 :].numpy()
        logits = np.asarray(ours.logits(jax.numpy.asarray([prompt + new[:-1]])))[0, length - 1 :]
        best = np.sort(whole, axis=-1)
        assert out[0, length:].tolist() == new
        margin, difference = (best[:, -1] - best[:, -2]).min(), np.abs(logits - whole).max()
        assert margin > 3 * difference, (margin, difference)
        assert len(set(new)) > 20 and (length + NEW) // CHUNK - length // CHUNK >= 5
