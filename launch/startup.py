"""What several commands begin with: the cache, a run's corpus, a run's tokenizer."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch import overrides
from training.config import RunConfig

if TYPE_CHECKING:
    from data.loader import Corpus


BAR = 20  # characters


def cache_folder() -> Path:
    """Where derived files live that any run may share: $XDG_CACHE_HOME/llama4_jax, or ~/.cache/llama4_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4_jax"


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A log on stderr for lines of progress: on a terminal each takes the place of the one before, behind a bar that
    shows the share it names ("42%")."""
    if not sys.stderr.isatty():
        yield partial(print, file=sys.stderr, flush=True)
        return

    def show(line: str) -> None:
        if found := re.search(r"\b(\d+)%", line):
            done = int(found[1]) * BAR // 100
            line = f"{'█' * done}{'░' * (BAR - done)} {line}"
        columns = shutil.get_terminal_size().columns
        print(f"\r\x1b[2K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(file=sys.stderr)


def open_corpus(cfg: RunConfig, log: Callable[[str], object] = print) -> Corpus:
    """The run's documents and tokenizer; ValueError if the models have another vocabulary."""
    overrides.check_vocabulary(cfg)
    from data.loader import Corpus

    corpus = Corpus.open(cfg.data, cache_folder(), log, images=cfg.images)
    overrides.check_vocabulary(cfg, corpus.tokenizer.vocab_size)
    return corpus
