"""Tokenizers: lossless, deterministic, Llama 4's ids, and readable by transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from etils import epath

from data import llama4_hf, llama4_tokenizer, tokenizer

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
def llama4() -> llama4_tokenizer.Llama4Tokenizer:
    """The package is found, not imported: only its tokenizer file is read."""
    if importlib.util.find_spec("llama_models") is None:
        pytest.skip("needs the Llama 4 tokenizer file of the llama-models package (extra: llama)")
    return tokenizer.load("llama4")


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
    assert tokenizer.find(tmp_path) is None and tokenizer.find(tmp_path / "a") == tmp_path / "a" / "tokenizer.model"
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
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer \(tokenizer.model or tokenizer.json\) at .*; .*'llama4'"
    ):
        tokenizer.load(tmp_path)
    (tmp_path / "junk").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="junk: neither a sentencepiece model nor tiktoken-format"):
        tokenizer.load(tmp_path / "junk")
    (tmp_path / "short").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="short: Llama 4's tokenizer has the ranks 0 to 199,999; this file has 2"):
        tokenizer.load(tmp_path / "short")


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


def test_llama4_reads_what_is_no_unicode_as_a_replacement(llama4):
    assert llama4.decode(llama4.encode("a\ud800b")) == "a\ufffdb"


def test_llama4_names_its_package_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"'llama4' is that of the llama-models package: run pip install 'llama4_jax\["
    ):
        tokenizer.load("llama4")


def test_llama4_special_ids():
    """As the specification has them; and as Meta's package, where it is there."""
    ids = llama4_tokenizer.SPECIAL_IDS
    golden = dict(begin_of_text=200000, end_of_text=200001, header_start=200005, header_end=200006, eom=200007,
                  eot=200008, finetune_right_pad=200018, image_start=200080, image_end=200081, image=200090,
                  patch=200092, reasoning_thinking_end=201143)  # fmt: skip
    assert {name: ids[f"<|{name}|>"] for name in golden} == golden
    if importlib.util.find_spec("llama_models"):
        theirs = pytest.importorskip("llama_models.llama4.tokenizer", exc_type=ImportError).Tokenizer.get_instance()
        assert ids.items() <= theirs.special_tokens.items()


CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  What is <|eot|>?\n"},
    {"role": "assistant", "content": "\nA token.\n\n漢字"},
    {"role": "user", "content": ""},
]


@pytest.mark.slow
def test_llama4_as_huggingface_reads_it_gives_the_same_ids(llama4, tmp_path):
    """Of texts, and of chats whose contents begin with no newline and name no special token."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: verify)")
    llama4.save(tmp_path)
    llama4_hf.write(llama4, epath.Path(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (202_048, llama4.bos_id, llama4.eos_id)
    assert theirs.pad_token_id == llama4.pad_id
    source = Path(tokenizer.__file__).read_text()
    for text in [*STRINGS, *random_strings(), *TEXTS, source]:
        ids = [llama4.bos_id, *llama4.encode(text)]
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == llama4.decode(ids)
    for reply in (False, True):
        text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=reply)
        assert text == llama4_tokenizer.chat_text(CHAT, reply)
        plain = [{**message, "content": message["content"].replace("<|eot|>", "eot").lstrip("\n")} for message in CHAT]
        found = theirs.apply_chat_template(plain, add_generation_prompt=reply, return_dict=True)
        assert found["input_ids"] == llama4.render_chat(plain, reply).tolist()


def test_a_chat_with_images_has_their_token_where_the_model_reads_them():
    jinja2 = pytest.importorskip("jinja2", reason="needs jinja2, which transformers brings (extra: verify)")

    def refuse(line):
        raise ValueError(line)

    def render(template, *parts):
        chat = [dict(role="user", content=[dict(type="text", text="What is "), *parts])]
        made = jinja2.Environment().from_string(template)
        return made.render(messages=chat, bos_token="<|begin_of_text|>", raise_exception=refuse)

    text, image = llama4_hf.CHAT_TEMPLATE, dict(type="image")
    whole = text.replace(llama4_hf.NO_IMAGES, llama4_hf.IMAGES)
    assert render(whole, image) == llama4_tokenizer.chat_text([dict(role="user", content="What is <|image|>")])
    for template, part, message in ((text, image, "reads text alone"), (whole, dict(type="audio"), "images alone")):
        with pytest.raises(ValueError, match=message):
            render(template, part)


def test_ranks_as_merges_give_the_same_ids():
    """Of a small vocabulary, with a token that is reached by no merges, but as a whole word."""
    library = pytest.importorskip("tokenizers", reason="needs tokenizers (extra: hf-tokenizers)")
    words = [b"he", b"th", b"the", b" t", b" the", b"in", b"ing", b"\xc3\xa9", b"qqqq"]
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *words])}
    made = llama4_hf.tokenizer_json(ranks)
    assert len(made["model"]["merges"]) == len(words) - 1  # all but qqqq's
    theirs = library.Tokenizer.from_str(json.dumps(made))
    theirs.encode_special_tokens = True  # their names in a text are text
    ours = tiktoken.Encoding("small", pat_str=llama4_tokenizer.O200K_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in ["the thing", "qqqq qqqqq", "caf\u00e9 in the", *STRINGS, *random_strings()]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode_ordinary(text), text


def test_chat_is_the_published_form(llama4):
    chat = [{"role": "user", "content": "Hello, world!"}]
    text = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello, world!<|eot|>"
    assert llama4_tokenizer.chat_text(chat) == text
    header = "<|header_start|>assistant<|header_end|>\n\n"
    assert llama4_tokenizer.chat_text(chat, reply=True) == text + header
    ids = llama4.render_chat(chat, reply=True)
    golden = [200000, 200005, 1556, 200006, 368, 19873, 24, 3817, 13, 200008, 200005, 140680, 200006, 368]
    assert ids.dtype == np.int32 and ids.tolist() == golden
    assert ids.tolist()[:10] == llama4.render_chat(chat).tolist()


def test_chat_text_never_becomes_special(llama4):
    ids = llama4.render_chat(CHAT)
    assert (ids == 200008).sum() == len(CHAT) and (ids == 200000).sum() == 1
    assert llama4.decode(ids) == "".join(f"{m['role']}\n\n{m['content']}" for m in CHAT)


def test_chat_agrees_with_metas(llama4, monkeypatch):
    """Their images are left out: they need torchvision."""
    for name in ("torch", "llama_models"):
        pytest.importorskip(name, reason="needs llama-models and torch (extra: verify)", exc_type=ImportError)
    images = types.ModuleType("llama_models.llama4.preprocess")
    images.ResizeNormalizeImageTransform = images.VariableSizeImageTransform = object  # pyright: ignore
    monkeypatch.setitem(sys.modules, images.__name__, images)
    chat_format = pytest.importorskip("llama_models.llama4.chat_format", exc_type=ImportError)
    datatypes = pytest.importorskip("llama_models.datatypes")
    monkeypatch.delitem(sys.modules, chat_format.__name__)  # what it became belongs to this test alone
    theirs = chat_format.ChatFormat(pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer.get_instance())
    roles = {"ipython": "tool"}
    for chat in (CHAT, [*CHAT, {"role": "ipython", "content": "3"}]):
        messages = [datatypes.RawMessage(role=roles.get(m["role"], m["role"]), content=m["content"]) for m in chat]
        assert theirs.encode_dialog_prompt(messages).tokens == llama4.render_chat(chat, reply=True).tolist()


@pytest.mark.parametrize(("message", "error"), [
    ({"role": "robot", "content": ""}, "message 2 has the role 'robot': one of system, user, assistant, ipython"),
    ({"role": "user"}, "message 2 has role: expected a role and, as text, a content"),
    ({"role": "assistant", "content": "", "tool_calls": []}, "message 2 has content, role, tool_calls: expected a"),
])  # fmt: skip
def test_chat_refuses_other_messages(message, error):
    with pytest.raises(ValueError, match=error):
        llama4_tokenizer.chat_text([CHAT[0], message])


# --- tokenizer.json


@pytest.fixture(scope="module")
def hf() -> bytes:
    """A byte-level BPE whose post-processor would add bos by itself."""
    library = pytest.importorskip("tokenizers", reason="needs tokenizers (extra: hf-tokenizers)")
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|eot|>"]
    trainer = library.trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet,
                                          show_progress=False)  # fmt: skip
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(8)
    return bpe.to_str().encode()


def test_tokenizer_json_round_trips_every_string(hf):
    bpe = tokenizer.from_bytes(hf)
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.pad_id) == (380, 0, 1, 1)
    for text in STRINGS + random_strings() + TEXTS[:3]:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and not {0, 1, 2} & set(ids)
        document = bpe.document(text)
        assert document.dtype == np.int32 and document.tolist() == [0, *ids, 1]


def test_tokenizer_json_agrees_with_transformers(hf, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: verify)")
    bpe = tokenizer.from_bytes(hf)
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert theirs.encode(text, add_special_tokens=False) == bpe.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (bpe.bos_id, bpe.eos_id, bpe.pad_id)


def test_tokenizer_json_takes_names_from_the_config_beside_it(hf, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(hf)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|eot|>", "pad_token": None, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (0, 2, 2)
    assert found.hash == tokenizer.from_bytes(hf).hash == hashlib.sha256(hf).hexdigest()
    found.save(tmp_path / "kept")
    kept = tokenizer.load(tmp_path / "kept" / "tokenizer.json")
    assert (kept.hash, kept.eos_id) == (found.hash, 2)
    assert json.loads((tmp_path / "kept" / "tokenizer_config.json").read_text()) == config


def test_tokenizer_json_spells_names_that_its_vocabulary_has_as_words(tmp_path):
    """Words are looked up whole, so that `encode_special_tokens` alone would give their ids."""
    library = pytest.importorskip("tokenizers", reason="needs tokenizers (extra: hf-tokenizers)")
    vocab = {word: i for i, word in enumerate(("[CLS]", "[SEP]", "[UNK]", "the", "[", "CLS]"))}
    words = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    found = tokenizer.from_bytes(words.to_str().encode())
    assert found.encode("the [CLS] [SEP] the") == [3, 4, 5, 4, 2, 3]
    assert found.document("unknown").tolist() == [0, 2, 1]


def test_bad_tokenizer_json_is_named(hf, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json of Hugging Face's tokenizers"):
        tokenizer.load(file)
    file.write_bytes(hf.replace(b"<s>", b"<a>"))
    with pytest.raises(ValueError, match=r'no bos token: .* <a>, </s>, <\|eot\|>; name one as "bos_token" in a token'):
        tokenizer.load(file)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<b>"}')
    with pytest.raises(ValueError, match=r"names bos_token '<b>', which tokenizer.json does not have"):
        tokenizer.load(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"run pip install 'llama4_jax\[hf-tokenizers\]'"):
        tokenizer.load(file)
