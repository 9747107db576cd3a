"""Rows that span two processes: the losses are those of one process with all devices."""

from __future__ import annotations

import json

import pytest
from support import run_processes

STEPS = """
import sys
from dataclasses import replace
import jax
address, processes, process, context = sys.argv[1], *map(int, sys.argv[2:])
if processes > 1:
    jax.distributed.initialize(address, processes, process)
import numpy as np
from data.batch import DTYPES, Batch
from llama4_jax.config import tiny_scout
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from training.loop import put_local
from training.start import initial_state
from training.mesh import make_mesh, row_share
from training.step import make_train_step

model = replace(tiny_scout(), vocab_size=64, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=8, chunk=8)
learner = Learner(model, OptimizerConfig(learning_rate=1e-2, warmup=1), compute_dtype="float32", remat="layer")
cfg = RunConfig("two", {"scout": learner}, mesh=MeshConfig(context=context), train=TrainConfig(3, 8, 64))
mesh = make_mesh(cfg.mesh)
share = row_share(mesh)
state, step, rng = initial_state(cfg, mesh), make_train_step(cfg, mesh, 1), np.random.default_rng(0)
for _ in range(3):
    shape = (8, 64)
    fields = {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}
    fields["tokens"][:] = rng.integers(0, 64, shape)
    fields["labels"][:] = np.roll(fields["tokens"], -1, axis=1)
    fields["segment_ids"][:] = 1 + (np.arange(64) >= 24)
    fields["positions"][:] = np.concatenate([np.arange(24), np.arange(40)])
    fields["loss_mask"][:] = 1
    rows = 8 // share.parts
    mine = slice(share.part * rows, (share.part + 1) * rows)
    state, metrics = step(state, put_local(Batch(**{name: x[mine] for name, x in fields.items()}), mesh))
    sums = metrics["scout"]["sums"]
    print("loss", float(sums.by_domain["ce"].sum() / sums.tokens), float(metrics["scout"]["grad_norm"]), flush=True)
"""


def run(processes: int, context: int) -> list[list[list[float]]]:
    """Per process, loss and gradient norm of each step."""
    outputs = run_processes(processes, STEPS, context)
    return [[json.loads(f"[{','.join(line.split()[1:])}]") for line in out.splitlines() if line.startswith("loss")]
            for out in outputs]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("context", [4, 8])
def test_two_processes_give_the_losses_of_one(context):
    """Context 4: a row within a process; 8: over both."""
    (alone,) = run(1, context)
    first, second = run(2, context)
    assert len(alone) == 3 and first == second
    for got, want in zip(first, alone, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
