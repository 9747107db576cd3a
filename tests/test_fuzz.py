"""A little of `make fuzz`: whatever readers of foreign input are given, they take it or refuse it in one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tools import fuzz

CASES = dict(config=100, safetensors=200, jsonl=40, targets=150, cli=40)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_any_input_is_taken_or_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    got = fuzz.run(name, tmp_path, cases=CASES[name], seed=1)
    assert not got.failed
    assert got.refused and (got.taken or name == "cli") and got.taken + got.refused == CASES[name]


def test_what_fails_would_be_seen():
    dice = random.Random(0)

    def raises(error: Exception) -> str:
        def case(_: random.Random) -> bool:
            raise error

        return fuzz.attempt(case, dice)

    def hangs(_: random.Random) -> bool:
        while True:
            pass

    assert raises(ValueError("no")) == "refused"
    assert raises(ValueError("no\nmore")).startswith("not one line")
    assert raises(KeyError("x")).startswith("KeyError: 'x' (test_fuzz.py:")
    before, fuzz.SECONDS = fuzz.SECONDS, 0.2
    try:
        assert fuzz.attempt(hangs, dice).startswith("no end within")
    finally:
        fuzz.SECONDS = before
