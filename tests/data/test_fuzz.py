"""Damaged shards: every record is read intact, visibly changed, or counted; nothing but one line of ValueError."""

from __future__ import annotations

from collections import Counter

import pytest

from tools import fuzz_sources as fuzz

CASES = 400  # 100 of every format, 25 of every damage to it


@pytest.mark.parametrize("kind", fuzz.FORMATS)
def test_damaged_shards_lose_nothing_without_a_word(tmp_path, kind):
    seen = Counter()
    for number in range(fuzz.FORMATS.index(kind), CASES, len(fuzz.FORMATS)):
        how, got = fuzz.case(number, 0, kind, tmp_path / "case")
        seen[how, fuzz.check(kind, how, got)] += 1
    assert {how for how, _ in seen} == set(fuzz.DAMAGES)
    assert seen["bits", "refused"] < 25 and any(word != "refused" for _, word in seen), seen


@pytest.mark.parametrize("kind", fuzz.FORMATS)
def test_what_is_not_damaged_is_read_whole(tmp_path, kind):
    file = fuzz.write(tmp_path / "shards", kind, fuzz.documents())
    wanted = fuzz.untouched(file, kind, fuzz.documents(), "bits", [])
    assert len(wanted) == (fuzz.DOCUMENTS if kind in ("jsonl", "parquet") else 0)
    got = fuzz.outcome(file, kind, fuzz.documents(), tmp_path / "cache", wanted)
    assert got == (fuzz.DOCUMENTS, 0, 0, "", fuzz.DOCUMENTS, ())


def test_a_silent_loss_would_be_seen():
    with pytest.raises(AssertionError):
        fuzz.check("jsonl", "bits", fuzz.Outcome(58, 0, 1, records=60))
    with pytest.raises(AssertionError):
        fuzz.check("parquet", "bits", fuzz.Outcome(44, 0, 16, records=60, lost=("a document",)))
