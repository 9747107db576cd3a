"""Tokenizers: one small interface over sentencepiece models, Llama 4's byte-pair ranks (tiktoken format) and the
`tokenizer.json` of the tokenizers library.

The first two are lossless: decode(encode(text)) == text for every Unicode string when the model normalises nothing, as
the models trained here do not; of a tokenizer.json that is as its file says.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import ClassVar

import numpy as np
import sentencepiece
import tiktoken
from etils import epath

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
INSTALLED = "llama4"
"""The name under which Llama 4's tokenizer is found in an installed llama-models."""


class Tokenizer(ABC):
    """Text to token ids and back. `hash` is the sha256 of the model file, so it names the vocabulary exactly."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    FILE = MODEL_FILE

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
        ids = self._ids(text)
        document = np.empty(len(ids) + 2, np.int32)
        document[0], document[1:-1], document[-1] = self.bos_id, ids, self.eos_id
        return document

    def _ids(self, text: str) -> Sequence[int] | np.ndarray:
        """What `encode` gives, in whatever form comes fastest."""
        return self.encode(text)

    def save(self, folder: epath.PathLike) -> None:
        """Write the model file into `folder`, from which `load` reads it again."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.FILE).write_bytes(self._model)


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

    def _ids(self, text: str) -> Sequence[int] | np.ndarray:
        return self.encode(text) if "\u2581" in text else self._sp.encode_as_numpy(text)

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
    # Those that mean something to a model; the others are reserved. Text never becomes one of them.
    SPECIAL_IDS: ClassVar[dict[str, int]] = dict(
        begin_of_text=200_000, end_of_text=200_001, fim_prefix=200_002, fim_middle=200_003, fim_suffix=200_004,
        header_start=200_005, header_end=200_006, eom=200_007, eot=200_008, step=200_009, python_start=200_016,
        python_end=200_017, finetune_right_pad=200_018, image_start=200_080, image_end=200_081,
        tile_x_separator=200_084, tile_y_separator=200_085, image=200_090, patch=200_092,
        reasoning_thinking_start=201_142, reasoning_thinking_end=201_143,
    )  # fmt: skip
    STOPS = (200_001, 200_007, 200_008)  # ends of a text, of a message that a tool answers, of a turn
    ROLES = ("system", "user", "assistant", "ipython")  # the last: results of tools
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
        self.bos_id, self.eos_id, self.pad_id = (
            self.SPECIAL_IDS[name] for name in ("begin_of_text", "end_of_text", "finetune_right_pad")
        )

    def encode(self, text: str) -> list[int]:
        parts = (text[i : i + self.LONGEST] for i in range(0, len(text), self.LONGEST))
        return [token for part in parts for token in self._bpe.encode_ordinary(part)]

    def _ids(self, text: str) -> np.ndarray:
        parts = (text[i : i + self.LONGEST] for i in range(0, max(len(text), 1), self.LONGEST))
        found = [self._bpe.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._bpe.decode([int(i) for i in ids if i < self.RANKS])

    def chat(self, messages: Sequence[Mapping[str, str]], answer: bool = True) -> list[int]:
        """Messages {"role": of `ROLES`, "content": text} as an instructed model reads them; with `answer` the header of
        its own turn.

        Of each message <|header_start|>role<|header_end|>, two newlines, the content without spaces around it, <|eot|>
        (the published template of Llama 4, for text without calls of tools).
        """
        special = self.SPECIAL_IDS
        ids = [self.bos_id]
        for message in messages:
            if message["role"] not in self.ROLES:
                raise ValueError(f"no role {message['role']!r} in a chat: it is one of {', '.join(self.ROLES)}")
            ids += self._header(message["role"])
            ids += [*self.encode(message["content"].strip()), special["eot"]]
        return ids + (self._header("assistant") if answer else [])

    def _header(self, role: str) -> list[int]:
        special = self.SPECIAL_IDS
        return [special["header_start"], *self.encode(role), special["header_end"], *self.encode("\n\n")]


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library (of transformers' fast tokenizers).

    bos and eos are the special tokens that its post-processor sets around a text, or else those whose names are usual.
    """

    FILE = JSON_FILE
    BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|im_start|>", "[CLS]", "<|endoftext|>")
    EOS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|im_end|>", "[SEP]")
    PAD = ("<|finetune_right_pad|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")

    def __init__(self, model: bytes):
        super().__init__(model)
        if importlib.util.find_spec("tokenizers") is None:
            raise ImportError("a tokenizer.json needs the tokenizers library: pip install 'llama4_jax[tokenizers]'")
        import tokenizers

        try:
            self._tok = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"not a tokenizer.json ({error})") from error
        self._tok.no_padding()
        self._tok.no_truncation()
        self._tok.encode_special_tokens = True  # their names in a text are ordinary text
        self.vocab_size = 1 + max(self._tok.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        around = self._tok.encode("a", add_special_tokens=True).ids
        inside = self._tok.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(around)) if around[i : i + len(inside)] == inside), 0)
        before, after = around[:at], around[at + len(inside) :]
        bos, eos = before[0] if before else self._named(self.BOS), after[-1] if after else self._named(self.EOS)
        if bos is None or eos is None:
            raise ValueError(f"no token begins or ends a document: it has none of {', '.join((*self.BOS, *self.EOS))}")
        self.bos_id, self.eos_id = bos, eos
        pad = self._named(self.PAD)
        self.pad_id = eos if pad is None else pad

    def _named(self, names: Sequence[str]) -> int | None:
        return next((found for name in names if (found := self._tok.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=True)


def from_bytes(model: bytes) -> Tokenizer:
    """The tokenizer of a file's content: tiktoken's "base64 rank" lines, a tokenizer.json, or a sentencepiece model."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", model):
        return Llama4Tokenizer(model)
    if model.lstrip()[:1] == b"{":
        return JsonTokenizer(model)
    try:
        return SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise ValueError("neither a sentencepiece model, nor tiktoken-format ranks, nor a tokenizer.json") from error


def load(path: epath.PathLike) -> Tokenizer:
    """Read a tokenizer from its file, or from a folder that holds it as `tokenizer.model` or `tokenizer.json`; "llama4"
    is that of an installed llama-models, unless something else is there under this name."""
    path = epath.Path(path)
    if str(path) == INSTALLED and not path.exists():
        path = _installed()
    if path.is_dir():
        path = beside(path) or path / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    try:
        return from_bytes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def beside(folder: epath.PathLike) -> epath.Path | None:
    """The tokenizer's file in a folder of weights, if there is one."""
    files = (epath.Path(folder) / name for name in (MODEL_FILE, JSON_FILE))
    return next((file for file in files if file.exists()), None)


def _installed() -> epath.Path:
    """Llama 4's tokenizer in the package llama-models, which is not imported."""
    spec = importlib.util.find_spec("llama_models")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (file := epath.Path(folder) / "llama4" / MODEL_FILE).exists():
            return file
    raise FileNotFoundError(
        "no tokenizer at llama4, nor the package llama-models that has Llama 4's: pip install 'llama4_jax[llama]', or "
        "give its tokenizer.model"
    )


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
