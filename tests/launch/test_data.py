"""`llama4 data` and `llama4 tokenizer` on a small corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import cli


def output(line: str, capsys) -> str:
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def test_data_describes_what_is_read(corpus: Path, capsys):
    fields = f"--data.sources text={corpus} --data.vocab-size 320 --data.weights long=0.25 --data.heldout 0.2"
    facts = json.loads(output(f"data inspect {fields} --json --show 1", capsys))
    assert facts["tokenizer"]["vocab_size"] == 320
    long, short = facts["domains"]["long"], facts["domains"]["short"]
    assert (long["documents"], short["documents"]) == (200, 100)
    assert all(d["train"] + d["heldout"] == d["documents"] and d["heldout"] > 0 for d in (long, short))
    assert (long["share"], short["share"]) == (0.25, 0.75)
    assert facts["packing"]["seq_len"] == 256 and 0.9 < facts["packing"]["fill"] <= 1
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert all(any(sample["text"] in text for text in texts) for sample in facts["samples"])
    assert [s["at"] for s in facts["samples"]] == sorted(s["at"] for s in facts["samples"])
    assert sum(s["tokens"] for s in facts["samples"]) <= 256 and {s["row"] for s in facts["samples"]} == {0}
    pieces = sum(facts["lengths"].values())
    assert pieces == pytest.approx(facts["packing"]["pieces_per_row"] * facts["packing"]["rows"], rel=1e-3)
    assert long["read_share"] == pytest.approx(0.25, abs=0.05)
    table = output(f"data inspect {fields} --show 1", capsys)
    assert "25.0%" in table and facts["samples"][0]["text"][:60] in table
    third = json.loads(output(f"data inspect {fields} --json --show 1 --step 3", capsys))
    assert third["samples"] != facts["samples"] and third["step"] == 3


def test_text_cannot_steer_the_terminal(tmp_path: Path, monkeypatch, capsys):
    """Escape sequences, marks that turn the writing round and rich's markup are shown for what they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evil = "\x1b[2J\x07[bold red]x[/] \u202eabc\x9b31m \u2066"
    texts = [f"{evil} {n} " + "the same words again " * 8 for n in range(90)]
    lines = [json.dumps(dict(text=text, domain=f"d\x1b{n % 2}")) for n, text in enumerate(texts)]
    (tmp_path / "evil.jsonl").write_text("\n".join(lines))
    fields = f"--data.sources text={tmp_path}/evil.jsonl --data.vocab-size 320 --model.vocab-size 320"
    shown = output(f"data inspect {fields} --show 2", capsys)
    assert not set("\x1b\x07\x9b\u202e\u2066") & set(shown)
    assert r"\x1b[2J\x07[bold red]x[/] \u202eabc\x9b31m \u2066" in shown and r"d\x1b1" in shown


def test_tokenizer_goes_round(corpus: Path, tmp_path: Path, capsys):
    folder = tmp_path / "bpe"
    made = json.loads(
        output(f"tokenizer train --to {folder} --data.sources text={corpus} --data.vocab_size 320 --json", capsys)
    )
    assert made["vocab_size"] == 320
    assert json.loads(output(f"tokenizer info --tokenizer {folder} --json", capsys)) == made
    ids = json.loads(output(f"tokenizer encode --tokenizer {folder} alpha beta --json", capsys))
    assert output(f"tokenizer encode --tokenizer {folder} alpha beta", capsys).split() == [str(i) for i in ids]
    assert output(f"tokenizer decode --tokenizer {folder} {' '.join(map(str, ids))}", capsys) == "alpha beta\n"
    assert cli.main(f"tokenizer decode --tokenizer {folder} 320".split()) == 2
    assert "'320' is no token id: they are whole numbers below 320" in capsys.readouterr().err
