"""Tokenizers: lossless, deterministic, Llama 4's ids, and readable by transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from data import tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop: 12345 times, it runs.\n",
    "def f(x):\n    for i in range(10):\n        x += i\n    return x\n",
    "Größe, naïve, café, Ελληνικά; numbers 3.14159 and 2026.\n",
] * 40
STRINGS = [
    "", " ", "   ", "\n", "\r\n\t\x0b\x0c\x1c\x85\u00a0\u2028\u3000 x", "a\n\n\n    b\t\tc  \n ", "\0a\0",
    "\u2581", " \u2581 x\u2581\u2581", "\u2585\ufffd\ufeff",
    "e\u0301 é 漢字 ひらがな العربية हिन्दी", "😀👩‍👧", "\U0010ffff", "<|eot|>",
    "<s></s><unk><pad><0x0A>", "<|begin_of_text|><|eot|>", "don't DON'T I'LL 1234567 x=1;//\n", "a" * 5000, " " * 5000,
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> bytes:
    return tokenizer.train_bpe(TEXTS, 400)


@pytest.fixture(scope="module")
def llama4() -> tokenizer.Tokenizer:
    """The package is found, not imported: only its tokenizer file is read."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        pytest.skip("needs the Llama 4 tokenizer file of the llama-models package (extra: llama)")
    return tokenizer.load(Path(spec.origin).parent / "llama4" / "tokenizer.model")


def random_strings() -> list[str]:
    rng = np.random.default_rng(0)
    points = [
        *range(0x80),
        *range(0x80, 0x3000, 7),
        0x2581,
        0xFEFF,
        *range(0x4E00, 0x5000, 5),
        *range(0x1F600, 0x1F640),
    ]
    return ["".join(map(chr, rng.choice(points, rng.integers(1, 60)))) for _ in range(200)]


def test_trained_bpe_round_trips_every_string(model):
    bpe = tokenizer.from_bytes(model)
    for text in STRINGS + random_strings() + TEXTS[:3]:
        assert bpe.decode(bpe.encode(text)) == text
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.pad_id) == (400, 1, 2, 3)


def test_documents_lie_between_bos_and_eos_which_decode_to_nothing(model):
    bpe = tokenizer.from_bytes(model)
    ids = bpe.document("fox <s>")
    assert ids.dtype == np.int32 and ids[0] == bpe.bos_id and ids[-1] == bpe.eos_id
    assert not {bpe.bos_id, bpe.eos_id} & set(ids[1:-1].tolist())
    assert bpe.decode(ids) == "fox <s>"


def test_training_is_deterministic_and_merges_words_and_indentation(model):
    assert tokenizer.train_bpe(iter(TEXTS), 400) == model
    bpe = tokenizer.from_bytes(model)
    assert len(bpe.encode("range return")) <= 6
    assert len(bpe.encode("    ")) == 1
    assert bpe.encode("12") == bpe.encode("1") + bpe.encode("2"), "digits stand alone"


def test_training_says_what_vocabulary_the_corpus_can_fill():
    with pytest.raises(ValueError, match=r"vocab_size 5000: choose at most \d+"):
        tokenizer.train_bpe(["hello world"], 5000)
    with pytest.raises(ValueError, match=r"vocab_size 300: choose at least 3\d\d"):
        tokenizer.train_bpe(["".join(map(chr, range(0x4E00, 0x4E00 + 80)))] * 3, 300)


def test_saved_folders_load_alike(model, tmp_path):
    bpe = tokenizer.from_bytes(model)
    bpe.save(tmp_path / "a")
    again = tokenizer.load(epath.Path(tmp_path / "a"))
    assert again.hash == bpe.hash and again.encode(TEXTS[1]) == bpe.encode(TEXTS[1])
    assert tokenizer.load(tmp_path / "a" / "tokenizer.model").hash == bpe.hash
    assert tokenizer.from_bytes(tokenizer.train_bpe(TEXTS, 401)).hash != bpe.hash


def test_transformers_reads_a_saved_folder(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: verify)")
    bpe = tokenizer.from_bytes(model)
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], "  two\n\n\tspaces  ", "é 漢字 😀", "x = 12345"]:
        assert theirs.encode(text) == [bpe.bos_id, *bpe.encode(text)]
        assert theirs.decode(bpe.encode(text), clean_up_tokenization_spaces=False) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (bpe.bos_id, bpe.eos_id, bpe.pad_id)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "junk").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="junk: neither a sentencepiece model, nor tiktoken-format"):
        tokenizer.load(tmp_path / "junk")
    (tmp_path / "short").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="short: Llama 4's tokenizer has the ranks 0 to 199,999; this file has 2"):
        tokenizer.load(tmp_path / "short")


@pytest.mark.parametrize("around", [True, False], ids=["post-processor", "names"])
def test_a_tokenizer_json(around, tmp_path):
    """Documents lie between its specials, whose names in a text are text; it is saved as it was."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    sizes = dict(vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(**sizes))
    if around:
        pair = [("<s>", 1), ("</s>", 2)]
        theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    theirs.enable_truncation(5)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.get_vocab_size(), 1, 2, 0)
    for text in [*STRINGS, *random_strings(), TEXTS[1] * 9]:
        ids = ours.document(text)
        assert ids.dtype == np.int32 and (ids[0], ids[-1]) == (1, 2) and not {0, 1, 2} & set(ids[1:-1].tolist())
        assert ours.decode(ids) == text and ids[1:-1].tolist() == ours.encode(text)
    ours.save(tmp_path / "kept")
    assert tokenizer.load(tmp_path / "kept").hash == ours.hash
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["tokenizer.json"]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer\.json"):
        tokenizer.load(tmp_path / "bad.json")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    missing = ("tokenizers", "llama_models")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at llama4, nor the package llama-models .*\[llama\]"):
        tokenizer.load("llama4")
    with pytest.raises(ImportError, match=r"llama4_jax\[tokenizers\]"):
        tokenizer.from_bytes(b'{"model": {}}')


def test_a_document_is_what_encode_gives(model, llama4):
    for text in STRINGS + random_strings() + ["b" * 900_000 + " c"]:
        for one in (tokenizer.from_bytes(model), llama4):
            assert one.document(text).tolist() == [one.bos_id, *one.encode(text), one.eos_id]


def test_llama4_is_found_where_it_is_installed(llama4):
    assert tokenizer.load("llama4").hash == llama4.hash


def test_llama4_chat(llama4):
    """The published template, and transformers' own tokenizer where it can be built from these ranks."""
    messages = [dict(role="system", content="Be brief."), dict(role="user", content=" What is 2+2? <|eot|>\n")]
    s = llama4.SPECIAL_IDS
    assert s["eot"] == 200_008 and s["patch"] == 200_092 and set(llama4.STOPS) == {s["end_of_text"], s["eom"], s["eot"]}
    want = [200_000]
    for role, content in (("system", "Be brief."), ("user", "What is 2+2? <|eot|>")):
        want += [200_005, *llama4.encode(role), 200_006, 368, *llama4.encode(content), 200_008]
    assert llama4.encode("\n\n") == [368]
    assert llama4.chat(messages, answer=False) == want
    assert llama4.chat(messages) == [*want, 200_005, *llama4.encode("assistant"), 200_006, 368]
    assert want.count(200_008) == 2, "the name of a special token in a message is text"
    with pytest.raises(ValueError, match="no role 'robot' in a chat: it is one of system, user, assistant, ipython"):
        llama4.chat([dict(role="robot", content="")])


def test_llama4_golden_ids(llama4):
    assert (llama4.vocab_size, llama4.bos_id, llama4.eos_id, llama4.pad_id) == (202_048, 200_000, 200_001, 200_018)
    text = "Hello, world! It's 12345 café.\n\n"
    golden = [200000, 19873, 24, 3817, 13, 11680, 220, 7235, 2127, 49652, 1574, 200001]
    assert llama4.document(text).tolist() == golden
    assert llama4.decode(golden) == text
    assert llama4.hash.startswith("d0bdbaf5") and llama4.hash.endswith("6ed")


def test_llama4_round_trips_every_string(llama4):
    for text in STRINGS + random_strings():
        assert llama4.decode(llama4.encode(text)) == text
    long = "a" * 1_000_001
    assert llama4.decode(llama4.encode(long)) == long
