"""What is trained on does not depend on the processes, nor on how many go on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from etils import epath
from support import run_processes

from data.loader import Corpus
from training.config import RunConfig
from training.record import write_config

TRAIN = """
import json, sys
from hashlib import blake2b
import jax
address, processes, process = sys.argv[1], *map(int, sys.argv[2:4])
folder, cache, steps = *sys.argv[4:6], int(sys.argv[6])
if processes > 1:
    jax.distributed.initialize(address, processes, process)
from dataclasses import replace
import numpy as np
from etils import epath
from data.loader import Corpus
from training.record import config_from_json
from training.loop import train

class Heard(Corpus):
    def train(self, *args):
        stream = super().train(*args)
        class Stream:
            get_state, close = stream.get_state, stream.close
            def __next__(self):
                batch = next(stream)
                fields = [field for field in batch if field is not None]
                rows = [blake2b(b"".join(np.ascontiguousarray(field[n]).tobytes() for field in fields)).hexdigest()
                        for n in range(len(batch.tokens))]
                print("rows", json.dumps(rows), flush=True)
                return batch
        return Stream()

cfg = config_from_json(json.loads((epath.Path(folder) / "config.json").read_text()))
cfg = replace(cfg, out=folder, train=replace(cfg.train, steps=steps))
train(cfg, Heard.open(cfg.data, cache, log=lambda _: None), lambda _: None)
"""


def rows(processes: int, folder: Path, cache: Path, steps: int) -> list[list[str]]:
    """The hash of every row of every global batch that the job draws up to step `steps`."""
    heard = [[json.loads(line.removeprefix("rows ")) for line in output.splitlines() if line.startswith("rows ")]
             for output in run_processes(processes, TRAIN, folder, cache, steps)]  # fmt: skip
    return [[row for part in batch for row in part] for batch in zip(*heard, strict=True)]


@pytest.mark.slow
def test_one_process_four_and_two_that_go_on_read_the_same(
    tmp_path: Path, documents: Path, corpus: Corpus, run_config: Callable[..., RunConfig]
):
    """Fifty steps, of 1 x 8 devices; of 4 x 2, and from their checkpoint of step 25 of 2 x 4."""
    cache = documents.parent / "cache"
    folders = tmp_path / "one", tmp_path / "many"
    for folder in folders:
        cfg = run_config(folder, steps=50, eval_every=25, checkpoint_every=25, log_every=25)
        data = replace(cfg.data, sources=dict(text=str(documents)), vocab_size=320, heldout=0.1)
        write_config(epath.Path(folder), replace(cfg, data=data))
    one = rows(1, folders[0], cache, 50)
    assert len(one) == 50 and all(len(set(batch)) == 8 for batch in one)
    assert len({row for batch in one for row in batch}) > 350, "rows differ from each other"
    four = rows(4, folders[1], cache, 25)
    two = rows(2, folders[1], cache, 50)
    assert four == one[:25] and two == one[25:]
