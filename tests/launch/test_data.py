"""`llama4 data` and `llama4 tokenizer` on a small corpus."""

from __future__ import annotations

import json
from pathlib import Path

from data.config import DataConfig
from data.loader import Corpus, ledger
from launch import cli, data_ledger


def output(line: str, capsys) -> str:
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def test_data_describes_what_is_read(corpus: Path, capsys):
    fields = f"--data.sources text={corpus} --data.vocab-size 320 --data.weights long=0.25 --data.heldout 0.2"
    facts = json.loads(output(f"data inspect {fields} --json --show 3", capsys))
    assert facts["tokenizer"]["vocab_size"] == 320
    long, short = facts["domains"]["long"], facts["domains"]["short"]
    assert (long["documents"], short["documents"]) == (200, 100)
    assert all(d["train"] + d["heldout"] == d["documents"] and d["heldout"] > 0 for d in (long, short))
    assert (long["share"], short["share"]) == (0.25, 0.75)
    assert facts["packing"]["seq_len"] == 256 and 0.9 < facts["packing"]["fill"] <= 1
    assert len(facts["samples"]) == 3
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert all(sample["text"] in texts for sample in facts["samples"])
    table = output(f"data inspect {fields} --show 1", capsys)
    assert "25.0%" in table and facts["samples"][0]["text"][:100] in table


EVIL = "a\x1b[31m\x07 [red]b[/red] \u202ecba\u2028 \x9b2J\r"


def test_data_from_outside_reaches_no_terminal(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "evil.jsonl"
    lines = [json.dumps({"text": f"{EVIL} {n} " + "word " * (n % 9), "domain": f"[red]{EVIL}"}) for n in range(200)]
    file.write_text("\n".join(lines))
    shown = output(
        f"data inspect --data.sources text={file} --data.vocab-size 305 --data.heldout 0.2 --show 20", capsys
    )
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e\u2028")
    assert r"a\x1b[31m\x07 [red]b[/red] \u202ecba\u2028 \x9b2J\x0d" in shown


def test_data_begins_with_the_batch_of_a_step(corpus: Path, capsys):
    fields = f"--data.sources text={corpus} --data.vocab-size 320 --batches 1 --show 4 --json"
    first, third = (json.loads(output(f"data inspect {fields} --step {k}", capsys)) for k in (1, 3))
    assert (first["batches"]["batches"], third["batches"]["step"]) == (1, 3)
    assert third["samples"][0]["step"] == 3 and first["samples"] != third["samples"]
    assert sum(n for _, n in first["batches"]["lengths"]) == first["batches"]["pieces"]
    for words, error in (("--step 0", "--step must be at least 1"), ("--step 9999", "give at most 250")):
        assert cli.main(f"data inspect {words}".split()) == 2
        assert error in capsys.readouterr().err
    assert cli.main(["data", "inspct"]) == 2
    assert "no action 'inspct'; the nearest is 'inspect'" in capsys.readouterr().err


def test_the_ledger_counts_what_was_handed_out(tmp_path: Path):
    """To the row, in a stage and in the run."""
    corpus = Corpus.open(DataConfig(synthetic=True, vocab_size=400), tmp_path, lambda line: None)
    place, tokens = None, []
    for batch, seq_len in ((3, 64), (2, 128)):
        stream = corpus.train(batch, seq_len, 64, 0, place=place, crossing=True)
        tokens.append(sum(int((next(stream).segment_ids > 0).sum()) for _ in range(5)))
        place = json.loads(json.dumps(stream.get_state())) | {"tokens_seen": 0}
        stream.close()
        found = data_ledger.count(corpus, place)["domains"]["synthetic"]
        assert (found["tokens"], found["run_tokens"]) == (tokens[-1], sum(tokens))
    assert found["documents"] == sum(1 for _ in ledger(corpus, place)) and found["share"] == found["wanted"] == 1


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
