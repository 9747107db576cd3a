"""Tokenizers of Hugging Face's `tokenizer.json` (its fast tokenizers), read with the package `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from etils import epath

from data.tokenizer import CONFIG_FILE, HF_FILE, Tokenizer

KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]"),
    "pad": ("<pad>", "<|finetune_right_pad|>", "<|finetune_right_pad_id|>", "[PAD]", "<|pad|>"),
}
"""What these tokens are commonly called, the likeliest first, where no tokenizer_config.json names them."""


class HFTokenizer(Tokenizer):
    """A `tokenizer.json`, with the tokens that the `tokenizer_config.json` beside it names as bos, eos and pad.

    What it does not name is looked for among the file's special tokens (`KNOWN`); where there is no pad, it is eos.
    Whether decoding gives the text back is up to the file: one that lowers case or merges spaces does not.
    """

    FILE = HF_FILE

    def __init__(self, model: bytes, config: bytes = b""):
        """ValueError if the file, or its config, is broken or has no bos or eos; ImportError without `tokenizers`."""
        super().__init__(model)
        self._config = config
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"{HF_FILE} is read with the package tokenizers: run pip install 'llama4_jax[hf-tokenizers]'"
            ) from error
        try:
            self._model = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # it raises nothing narrower
            raise ValueError(f"not a {HF_FILE} of Hugging Face's tokenizers ({error})") from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # their names in a text are text
        added = self._model.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = 1 + max([*self._model.get_vocab().values(), *added])
        named = _named(config)
        self.bos_id, self.eos_id = self._find("bos", named), self._find("eos", named)
        self.pad_id = self._find("pad", named, self.eos_id)
        # A model whose vocabulary holds a special token as a word may still spell it by its id.
        ids = {*self._special.values(), self.bos_id, self.eos_id, self.pad_id} - {self._unknown()}
        self._is_special = np.isin(np.arange(self.vocab_size), sorted(ids))
        names = sorted((name for name, i in self._special.items() if i in ids and len(name) > 1), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def ids(self, text: str) -> np.ndarray:
        ids = self._plain(text)
        if not self._is_special[ids].any():
            return ids
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        parts = [self._plain(text[a:b]) for a, b in pairwise(cuts)]
        ids = np.concatenate(parts)
        if self._is_special[ids].any():
            raise ValueError(f"this {HF_FILE} spells ordinary text with a special token: {text[:60]!r}")
        return ids

    def _plain(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def special(self, name: str) -> int | None:
        return self._special.get(name)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: epath.PathLike) -> None:
        """Also writes the `tokenizer_config.json`: the one that was read, else one that names bos, eos and pad."""
        super().save(folder)
        name = self._model.id_to_token
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=name(self.bos_id), eos_token=name(self.eos_id),
            pad_token=name(self.pad_id),
        )  # fmt: skip
        (epath.Path(folder) / CONFIG_FILE).write_bytes(self._config or json.dumps(config, indent=1).encode())

    def _find(self, kind: str, named: dict[str, str], default: int | None = None) -> int:
        if (name := named.get(kind)) is not None:
            found = self._model.token_to_id(name)
            if found is None:
                raise ValueError(f"{CONFIG_FILE} names {kind}_token {name!r}, which {HF_FILE} does not have")
            return found
        for name in KNOWN[kind]:
            if name in self._special:
                return self._special[name]
        if default is None:
            raise ValueError(
                f"no {kind} token: {HF_FILE} has the special tokens {', '.join(self._special) or 'none'}; name one "
                f'as "{kind}_token" in a {CONFIG_FILE} beside it'
            )
        return default

    def _unknown(self) -> int | None:
        """Stands for any text that the vocabulary lacks."""
        name = getattr(self._model.model, "unk_token", None)
        if name is None:  # of a Unigram model the file alone tells
            return json.loads(self._file)["model"].get("unk_id")
        return self._model.token_to_id(name)


def _named(config: bytes) -> dict[str, str]:
    """The names of bos, eos and pad in a tokenizer_config.json, each a string or an object with its content."""
    try:
        values: Any = json.loads(config or b"{}")
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG_FILE} is not a JSON object")
    tokens = {kind: values.get(f"{kind}_token") for kind in KNOWN}
    contents = {kind: token.get("content") if isinstance(token, dict) else token for kind, token in tokens.items()}
    return {kind: name for kind, name in contents.items() if isinstance(name, str)}
