"""A corpus of a few hundred short documents in two domains, and a cache of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    """An export's memory counts from what the process has, and a process of tests may have more than an export may."""
    monkeypatch.setattr("training.transfer.resident", lambda: 5 * 10**8)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A JSONL file with 200 documents of domain "long" and 100 of "short"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "corpus.jsonl"
    words = [f"{a}{b}" for a in ("al", "be", "ga", "de", "ep") for b in ("pha", "ta", "mma", "lta", "silon")]
    lines = []
    for n in range(300):
        text = " ".join(words[(n * k + k * k) % len(words)] for k in range(10 + n % 50)) + f" {n}."
        lines.append(json.dumps({"text": text, "domain": "long" if n % 3 else "short"}))
    path.write_text("\n".join(lines))
    return path
