"""Held-out cross-entropy: what whole logits give, on any mesh, in any number of microbatches."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.axes import Execution
from training.config import MeshConfig
from training.evaluate import evaluate, make_eval_step
from training.mesh import make_mesh
from training.state import create_state, graphdef


def naive(params, learner, batches, domains):
    """Mean over tokens of -log softmax(logits)[label], the logits whole."""
    model = nnx.merge(graphdef(learner), params)
    ce, of = [], []
    for batch in batches:
        out = model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)), Execution())
        log_p = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding), axis=-1)
        rows = -np.take_along_axis(np.asarray(log_p), batch.labels[..., None], axis=-1)[..., 0]
        ce.append(rows[batch.loss_mask > 0])
        of.append(batch.domain[batch.loss_mask > 0])
    ce, of = np.concatenate(ce).astype(np.float64), np.concatenate(of)
    return {"ce": ce.mean(), **{f"ce/{name}": ce[of == i].mean() for i, name in enumerate(domains)}}


@pytest.mark.parametrize(
    ("mesh", "devices", "parts"),
    [(MeshConfig(), 1, 1), (MeshConfig(), 1, 2), (MeshConfig(fsdp=2, expert=2, tensor=2), 8, 2)],
)
def test_equals_the_naive_computation(make_run, corpus, mesh, devices, parts):
    cfg = make_run()
    learner = replace(cfg.learners["scout"], microbatches=parts)
    at = make_mesh(mesh, jax.devices()[:devices])
    batches = corpus.heldout(cfg.train.batch, cfg.train.seq_len, learner.model.chunk, 2)
    assert len(batches) == 2 and (batches[1].segment_ids == 0).any()
    params = create_state(cfg, at).learners["scout"].params
    found = evaluate(make_eval_step(learner, at, 2), params, batches, at, corpus.domains)
    whole = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    want = naive(whole, learner, batches, corpus.domains)
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-5)
    measured = ("ce", "accuracy", "entropy", "ece")
    assert set(found) == {f"{name}{of}" for name in measured for of in ("", "/even", "/odd")}
    assert 0 < found["accuracy"] < 1 and 0 < found["ece"] < 1 and found["ece"] <= found["ece/even"] + found["ece/odd"]
