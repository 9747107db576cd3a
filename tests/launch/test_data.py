"""`llama4 data` and `llama4 tokenizer` on a small corpus."""

from __future__ import annotations

import json
from pathlib import Path

from launch import cli


def output(line: str, capsys) -> str:
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def test_data_describes_what_is_read(corpus: Path, capsys):
    fields = f"--data.sources text={corpus} --data.vocab-size 320 --data.weights long=0.25 --data.heldout 0.2"
    facts = json.loads(output(f"data {fields} --json --show 3", capsys))
    assert facts["tokenizer"]["vocab_size"] == 320
    long, short = facts["domains"]["long"], facts["domains"]["short"]
    assert (long["documents"], short["documents"]) == (200, 100)
    assert all(d["train"] + d["heldout"] == d["documents"] and d["heldout"] > 0 for d in (long, short))
    assert (long["share"], short["share"]) == (0.25, 0.75)
    assert facts["packing"]["seq_len"] == 256 and 0.9 < facts["packing"]["fill"] <= 1
    assert len(facts["samples"]) == 3
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert all(sample["text"] in texts for sample in facts["samples"])
    table = output(f"data {fields} --show 1", capsys)
    assert "25.0%" in table and facts["samples"][0]["text"][:100] in table


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
