"""Tokenizers: one small interface over sentencepiece models, Llama 4's byte-pair ranks (tiktoken format) and Hugging
Face's `tokenizer.json`.

The first two are lossless: decode(encode(text)) == text for every Unicode string when the model normalises nothing, as
the models trained here do not.
"""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import sha256

import numpy as np
import sentencepiece
from etils import epath

from data.images import NAMES, ImageIds

MODEL_FILE, HF_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


class Tokenizer(ABC):
    """Text to token ids and back. `hash` is the sha256 of the model file, so it names the vocabulary exactly."""

    FILE = MODEL_FILE
    """The name under which a folder holds the model file."""
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, model: bytes):
        self._file = model
        self.hash: str = sha256(model).hexdigest()

    @property
    def model_bytes(self) -> bytes:
        """The model file."""
        return self._file

    @abstractmethod
    def ids(self, text: str) -> np.ndarray:
        """Ids of the text alone, int32 [T], without bos or eos; names of special tokens in it are ordinary text."""

    def encode(self, text: str) -> list[int]:
        """The same as a list."""
        return self.ids(text).tolist()

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""

    def special(self, name: str) -> int | None:
        """The id of a special token that no text is encoded to, None where there is none of that name."""
        return None

    @property
    def image_ids(self) -> ImageIds | None:
        """The special tokens of images, None where any of them is missing."""
        found = {kind: self.special(name) for kind, name in NAMES.items()}
        ids = {kind: i for kind, i in found.items() if i is not None}
        return ImageIds(**ids) if len(ids) == len(NAMES) else None

    def document(self, text: str) -> np.ndarray:
        """A whole document, int32 [T]: bos, the text's tokens, eos."""
        ids = self.ids(text)
        document = np.empty(len(ids) + 2, np.int32)
        document[0], document[1:-1], document[-1] = self.bos_id, ids, self.eos_id
        return document

    def save(self, folder: epath.PathLike) -> None:
        """Write the model file into `folder`, from which `load` reads it again."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.FILE).write_bytes(self._file)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Where it has no pad piece, pad is eos: padding is masked everywhere."""

    def __init__(self, model: bytes):
        super().__init__(model)
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._sp.vocab_size()
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError("the sentencepiece model has no bos or no eos piece; both mark a document's ends")
        self.pad_id = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos_id
        # sentencepiece writes a space as U+2581, so a real U+2581 would come back as a space: spell it in bytes.
        bar = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._bar, self._bytes = np.array(bar, np.int32), all(self._sp.is_byte(i) for i in bar)

    def ids(self, text: str) -> np.ndarray:
        encode = self._sp.encode_as_numpy
        if not self._bytes or "\u2581" not in text:
            return encode(text)
        first, *rest = map(encode, text.split("\u2581"))
        return np.concatenate([first, *(ids for part in rest for ids in (self._bar, part))])

    def special(self, name: str) -> int | None:
        piece = self._sp.piece_to_id(name)
        return piece if self._sp.is_control(piece) else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._sp.decode([int(i) for i in ids])

    def save(self, folder: epath.PathLike) -> None:
        """Also writes the `tokenizer_config.json` with which transformers' AutoTokenizer reads the folder."""
        super().save(folder)
        name = self._sp.id_to_piece
        images = dict(additional_special_tokens=list(NAMES.values())) if self.image_ids else {}
        config = images | dict(
            tokenizer_class="LlamaTokenizer",
            bos_token=name(self.bos_id), eos_token=name(self.eos_id), unk_token=name(self._sp.unk_id()),
            pad_token=name(self.pad_id), legacy=False, add_prefix_space=False, add_bos_token=True, add_eos_token=False,
        )  # fmt: skip
        (epath.Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=1))


class SyntheticTokenizer(Tokenizer):
    """Of random tokens (data/synthetic.py): an id's text is its number. Its file is one line with their count."""

    HEADER = "llama4_jax synthetic tokens: "

    def __init__(self, model: bytes):
        super().__init__(model)
        self.vocab_size = int(model.decode().removeprefix(self.HEADER))
        self.bos_id, self.eos_id, self.pad_id = 1, 2, 3

    @classmethod
    def of(cls, vocab_size: int) -> SyntheticTokenizer:
        return cls(f"{cls.HEADER}{vocab_size}\n".encode())

    def ids(self, text: str) -> np.ndarray:
        """ValueError for anything but numbers below `vocab_size` with spaces between."""
        words = text.split()
        wrong = next((word for word in words if not word.isdecimal() or int(word) >= self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"synthetic tokens are their ids, 0 to {self.vocab_size - 1:,}, not {wrong[:40]!r}")
        return np.array(words, np.int64).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(i) for i in ids if i not in (self.bos_id, self.eos_id, self.pad_id))


def from_bytes(model: bytes, config: bytes = b"") -> Tokenizer:
    """The tokenizer of a model file's content: tiktoken's "base64 rank" lines, a `tokenizer.json`, to which `config`
    is the `tokenizer_config.json`, or a sentencepiece model."""
    if re.fullmatch(re.escape(SyntheticTokenizer.HEADER.encode()) + rb"\d+\n", model):
        return SyntheticTokenizer(model)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", model):
        from data.llama4_tokenizer import Llama4Tokenizer

        return Llama4Tokenizer(model)
    if re.match(rb'\s*\{\s*["}]', model):
        from data.hf_tokenizer import HFTokenizer

        return HFTokenizer(model, config)
    try:
        return SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise ValueError("neither a sentencepiece model nor tiktoken-format ranks nor a tokenizer.json") from error


def find(folder: epath.PathLike) -> epath.Path | None:
    """The model file that a folder holds, `tokenizer.model` before `tokenizer.json`, if it holds one."""
    files = (epath.Path(folder) / name for name in (MODEL_FILE, HF_FILE))
    return next((file for file in files if file.exists()), None)


def load(path: epath.PathLike) -> Tokenizer:
    """Read a tokenizer from its model file or from a folder that holds one (`find`); `llama4` in place of a path is
    Llama 4's, from the installed llama-models package."""
    from data import llama4_tokenizer

    named = llama4_tokenizer.installed() if str(path) == llama4_tokenizer.INSTALLED else epath.Path(path)
    file = find(named) if named.is_dir() else named
    if file is None or not file.exists():
        what = f" ({MODEL_FILE} or {HF_FILE})" if file is None else ""
        raise FileNotFoundError(f"no tokenizer{what} at {named}; a path, or {llama4_tokenizer.INSTALLED!r}")
    beside = file.parent / CONFIG_FILE
    try:
        return from_bytes(file.read_bytes(), beside.read_bytes() if beside.exists() else b"")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int, images: bool = False) -> bytes:
    """Train a sentencepiece BPE and return its model file; with the special tokens of `images` where there are any.

    Nothing is normalised, runs of spaces are merged as words are, digits stand alone, and what the vocabulary lacks
    (a newline too) is spelled in UTF-8 bytes. The same texts in the same order give the same bytes.
    """
    # sentencepiece drops sentences that are too long: cut lines, which it would not merge across anyway.
    lines = (line[i : i + 2000] for text in texts for line in text.split("\n") for i in range(0, len(line), 2000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_digits=True, max_sentence_length=1 << 16,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=4, minloglevel=2,
            control_symbols=list(NAMES.values()) if images else [],
        )  # fmt: skip
    except RuntimeError as error:
        low = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        high = re.search(r"value <= (\d+)", str(error))
        if not (low or high):
            raise
        bound = f"at least {low[1]}" if low else f"at most {high[1]}"  # pyright: ignore[reportOptionalSubscript]
        raise ValueError(f"this corpus cannot fill data.vocab_size {vocab_size}: choose {bound}") from error
    return model.getvalue()
