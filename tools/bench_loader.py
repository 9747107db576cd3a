"""CPU time of the training loader beside a bare loop over the same documents, with Llama 4's tokenizer.

    python -m tools.bench_loader [--tokenizer FILE] [--batch 8] [--seq 8192] [--mtok 8]

The bare loop encodes a document, appends its ids to a buffer, and cuts the buffer into rows: tokens, labels and
segments, and nothing else that a batch has. It reads the documents that the loader read. They run in turns, three times
each; CPU seconds are of all threads of the process, of the loader once its lanes are past their first windows, and the
best of three counts (a busy machine only adds to them).
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from data.config import DataConfig
from data.lanes import WINDOW_ROWS, WINDOW_TOKENS
from data.loader import Corpus, ledger
from data.tokenizer import load
from launch.startup import cache_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="llama4", help="default: that of an installed llama-models")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--mtok", type=float, default=8.0, help="millions of tokens to read")
    args = parser.parse_args()
    corpus = Corpus.open(DataConfig(), cache_folder(), tokens=load(args.tokenizer))
    steps = round(args.mtok * 1e6 / (args.batch * args.seq))
    times: dict[str, list[float]] = {"loader": [], "bare loop": []}
    for _ in range(3):
        seconds, read = loader(corpus, args.batch, args.seq, steps)
        times["loader"].append(seconds)
        times["bare loop"].append(bare(corpus, args.batch, args.seq, read))
    best = {name: min(of) for name, of in times.items()}
    print(json.dumps(dict(
        steps=steps, cpu_s_per_mtok={name: round(x, 3) for name, x in best.items()},
        mtok_per_cpu_s={name: round(1 / x, 2) for name, x in best.items()},
        ratio=round(best["bare loop"] / best["loader"], 3),
    )))  # fmt: skip


def loader(corpus: Corpus, batch: int, seq_len: int, steps: int) -> tuple[float, list[tuple[int, int]]]:
    """(CPU seconds per million tokens, the documents read) of so many batches behind the first windows."""
    stream = corpus.train(batch, seq_len, 8192, 0)
    for _ in range(2 * max(WINDOW_ROWS, WINDOW_TOKENS // seq_len)):
        next(stream)
    started, tokens = time.process_time(), 0
    for _ in range(steps):
        tokens += int((next(stream).segment_ids > 0).sum())
    seconds = time.process_time() - started
    place = stream.get_state()
    stream.close()
    number = {name: n for n, name in enumerate(corpus.domains)}
    return 1e6 * seconds / tokens, [(number[line["domain"]], line["document"]) for line in ledger(corpus, place)]


def bare(corpus: Corpus, batch: int, seq_len: int, read: list[tuple[int, int]]) -> float:
    """CPU seconds per million tokens of batches cut from one buffer."""
    started, size, made = time.process_time(), batch * seq_len, 0
    held: list[np.ndarray] = []
    count = 0
    for domain, index in read:
        held.append(corpus.tokenizer.document(corpus.sources[domain][index]))
        count += len(held[-1])
        while count > size:
            buffer = np.concatenate(held)
            segments = np.repeat(np.arange(len(held)), [len(ids) for ids in held])[:size]
            rows = [part.reshape(batch, seq_len).copy() for part in (buffer[:size], buffer[1 : size + 1], segments)]
            held, count, made = [buffer[size:]], count - size, made + rows[0].size
    return 1e6 * (time.process_time() - started) / made


if __name__ == "__main__":
    main()
