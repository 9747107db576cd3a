"""A teacher over several processes: their shards together hold what one process writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from support import run_processes

from data.loader import Corpus
from training.checkpoint import Checkpoints
from training.config import MeshConfig, RunConfig
from training.mesh import make_mesh
from training.record import run_record, write_config
from training.state import create_state
from training.targets import Reader

TEACH = """
import json, sys
import jax
address, processes, process, run, cache, out = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:]
if processes > 1:
    jax.distributed.initialize(address, processes, process)
from etils import epath
from data.loader import Corpus
from training.record import config_from_json
from training.target_record import Form
from training.teach import teach
cfg = config_from_json(json.loads((epath.Path(run) / "config.json").read_text()))
corpus = Corpus.open(cfg.data, cache, log=lambda _: None)
print(json.dumps(teach(cfg, corpus, out, Form("stratified", 4, 2), log=lambda _: None)))
"""


def teach(processes: int, *arguments: Path) -> list[dict]:
    """What `teach` returned on each process."""
    return [json.loads(output.splitlines()[-1]) for output in run_processes(processes, TEACH, *arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("context", [2, 8])
def test_two_processes_write_what_one_writes(
    context: int, tmp_path: Path, documents: Path, corpus: Corpus, run_config: Callable[..., RunConfig]
):
    """Context 2: a row within a process; 8: over both, of which the first one writes."""
    data = replace(run_config(tmp_path).data, sources={"text": str(documents)}, vocab_size=320, heldout=0.1)
    cfg = replace(run_config(tmp_path / "teacher", seq_len=128), data=data)
    with Checkpoints(cfg.folder, keep=1) as checkpoints:
        checkpoints.save(2, create_state(cfg, make_mesh(cfg.mesh)), {}, run_record(cfg, corpus.tokenizer.hash))
    write_config(epath.Path(cfg.folder), cfg)
    (learner,) = cfg.learners.values()
    taught = {"scout": replace(learner, init=f"run:{tmp_path / 'teacher'}")}
    cfg = replace(cfg, learners=taught, mesh=MeshConfig(context=context), train=replace(cfg.train, steps=4))
    write_config(epath.Path(tmp_path / "cfg"), cfg)

    (alone,) = teach(1, tmp_path / "cfg", documents.parent / "cache", tmp_path / "one")
    both = teach(2, tmp_path / "cfg", documents.parent / "cache", tmp_path / "two")
    assert [b["tokens"] > 0 for b in both] == [True, context < 8]
    assert alone["tokens"] <= sum(b["tokens"] for b in both)  # a document that both met is in the shards of both
    assert all(b["teacher"] == alone["teacher"] for b in both)
    stream = corpus.train(8, 128, 16, cfg.train.seed)
    with Reader(tmp_path / "one") as one, Reader(tmp_path / "two") as two:
        for batch in [next(stream) for _ in range(4)] + corpus.heldout(8, 128, 16, cfg.train.eval_batches):
            a, b = one.look_up(batch), two.look_up(batch)
            assert np.array_equal(a.present, batch.segment_ids > 0) and np.array_equal(b.present, a.present)
            # Up to rounding: a sum over devices that ends otherwise may move a draw, or the code of a mass.
            assert np.mean(a.ids == b.ids) > 0.99
            np.testing.assert_allclose(a.entropy, b.entropy, rtol=2e-3)
            np.testing.assert_allclose(a.mass, b.mass, rtol=0.1, atol=1e-3)
    stream.close()
