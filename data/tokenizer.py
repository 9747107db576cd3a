"""Tokenizers: one small interface over sentencepiece models and Llama 4's byte-pair ranks (tiktoken format).

Both are lossless: decode(encode(text)) == text for every Unicode string when the model normalises nothing, as the
models trained here do not.
"""

from __future__ import annotations

import base64
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import sha256

import numpy as np
import sentencepiece
import tiktoken
from etils import epath

MODEL_FILE = "tokenizer.model"


class Tokenizer(ABC):
    """Text to token ids and back. `hash` is the sha256 of the model file, so it names the vocabulary exactly."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, model: bytes):
        self._model = model
        self.hash: str = sha256(model).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without bos or eos; the names of special tokens in the text are ordinary text."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""

    def document(self, text: str) -> np.ndarray:
        """A whole document, int32 [T]: bos, the text's tokens, eos."""
        return np.array([self.bos_id, *self.encode(text), self.eos_id], np.int32)

    def save(self, folder: epath.PathLike) -> None:
        """Write the model file into `folder`, from which `load` reads it again."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)


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
        self._bar = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._bytes = all(self._sp.is_byte(i) for i in self._bar)

    def encode(self, text: str) -> list[int]:
        if not self._bytes or "\u2581" not in text:
            return self._sp.encode(text)
        ids: list[int] = []
        for n, part in enumerate(text.split("\u2581")):
            ids += (self._bar if n else []) + self._sp.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._sp.decode([int(i) for i in ids])

    def save(self, folder: epath.PathLike) -> None:
        """Also writes the `tokenizer_config.json` with which transformers' AutoTokenizer reads the folder."""
        super().save(folder)
        name = self._sp.id_to_piece
        config = dict(
            tokenizer_class="LlamaTokenizer",
            bos_token=name(self.bos_id), eos_token=name(self.eos_id), unk_token=name(self._sp.unk_id()),
            pad_token=name(self.pad_id), legacy=False, add_prefix_space=False, add_bos_token=True, add_eos_token=False,
        )  # fmt: skip
        (epath.Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


# The o200k pre-tokenisation, its alternatives in order. An English contraction may end a word.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join((
    f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",  # a word that ends in lower case
    f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",  # a word of capitals
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",  # newlines; spaces, the last of which leads the next word
))  # fmt: skip


class Llama4Tokenizer(Tokenizer):
    """Llama 4's tokenizer: 200,000 byte-pair ranks in tiktoken's text format, then 2,048 special ids."""

    RANKS, SPECIALS = 200_000, 2_048
    # tiktoken's regular expressions overflow their stack near a million characters without a break.
    LONGEST = 400_000

    def __init__(self, model: bytes):
        super().__init__(model)
        pairs = (line.split() for line in model.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(self.RANKS)):
            raise ValueError(f"Llama 4's tokenizer has the ranks 0 to {self.RANKS - 1:,}; this file has {len(ranks):,}")
        self._bpe = tiktoken.Encoding("llama4", pat_str=O200K_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = self.RANKS + self.SPECIALS
        self.bos_id, self.eos_id, self.pad_id = 200_000, 200_001, 200_018

    def encode(self, text: str) -> list[int]:
        parts = (text[i : i + self.LONGEST] for i in range(0, len(text), self.LONGEST))
        return [token for part in parts for token in self._bpe.encode_ordinary(part)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._bpe.decode([int(i) for i in ids if i < self.RANKS])


def from_bytes(model: bytes) -> Tokenizer:
    """The tokenizer of a model file's content: tiktoken's "base64 rank" lines, or a sentencepiece model."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", model):
        return Llama4Tokenizer(model)
    try:
        return SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise ValueError("neither a sentencepiece model nor tiktoken-format ranks") from error


def load(path: epath.PathLike) -> Tokenizer:
    """Read a tokenizer from its model file, or from a folder that holds it as `tokenizer.model`."""
    path = epath.Path(path)
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    try:
        return from_bytes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece BPE and return its model file.

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
        )  # fmt: skip
    except RuntimeError as error:
        low = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        high = re.search(r"value <= (\d+)", str(error))
        if not (low or high):
            raise
        bound = f"at least {low[1]}" if low else f"at most {high[1]}"  # pyright: ignore[reportOptionalSubscript]
        raise ValueError(f"this corpus cannot fill data.vocab_size {vocab_size}: choose {bound}") from error
    return model.getvalue()
