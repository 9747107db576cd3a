"""A model in Python in the lines that docs/export.md shows, and out again."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.tokenizer import SentencePieceTokenizer, train_bpe
from llama4_jax.config import ModelConfig, Rope
from llama4_jax.text import Transformer
from training.config import MeshConfig
from training.export_params import save_hf
from training.hf_import import load_hf
from training.load import load_model
from training.mesh import make_mesh

DOCS = Path(__file__).resolve().parents[2] / "docs" / "export.md"
CFG = ModelConfig(vocab_size=320, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=48,
                  expert_dim=32, num_experts=4, nope_every=2, chunk=8, floor_scale=5, max_position=256,
                  rope=Rope(10_000.0, 16.0, original=32))  # fmt: skip


@pytest.fixture
def exported(tmp_path, monkeypatch) -> SentencePieceTokenizer:
    """In the folder `exported`, as in the docs."""
    monkeypatch.chdir(tmp_path)
    tokenizer = SentencePieceTokenizer(train_bpe([f"a few words of text, number {n}" for n in range(300)], 320))
    save_hf(nnx.split(Transformer(CFG, nnx.Rngs(0)))[1], CFG, "exported", dtype="float32", tokenizer=tokenizer)
    return tokenizer


def test_the_lines_of_the_docs(exported):
    (lines,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(lines.strip().splitlines()) <= 5
    made: dict = {}
    exec(lines, made)
    ids = [exported.bos_id, *exported.encode("Once upon")]
    want = Transformer(CFG, nnx.Rngs(0)).logits(jnp.asarray([ids]))
    assert made["logits"].shape == (1, len(ids), 320) and made["logits"].dtype == jnp.float32
    np.testing.assert_array_equal(made["logits"], want)
    assert isinstance(made["model"], nnx.Module) and made["stops"] == (exported.eos_id,)
    # What another library does with an NNX module: its parameters out, changed, and a folder of them.
    _, params = nnx.split(made["model"])
    params = jax.tree.map(lambda x: x + 1, params)
    save_hf(params, made["model"].cfg, "tuned", dtype="float32")
    for got, changed in zip(jax.tree.leaves(load_hf("tuned")), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, changed)


def test_a_mesh_that_does_not_divide_the_model_is_named(exported):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    with pytest.raises(ValueError, match=r"num_heads \(4\) must be a multiple of tensor = 8: the nearest .* is 4"):
        load_model("exported", mesh=make_mesh(MeshConfig(tensor=8)))
