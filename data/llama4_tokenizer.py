"""Llama 4's tokenizer: 200,000 byte-pair ranks in tiktoken's text format, 2,048 special tokens, and its chat form.

The file is Meta's, under Meta's licence: it is read from a path, or from an installed llama-models package.
"""

from __future__ import annotations

import base64
import importlib.util
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import tiktoken
from etils import epath

from data.tokenizer import Tokenizer

INSTALLED = "llama4"
"""In place of a path: the tokenizer of the installed llama-models package."""
RANKS, SPECIALS = 200_000, 2_048
SPECIAL_IDS = {
    "<|begin_of_text|>": 200_000,  # before every document
    "<|end_of_text|>": 200_001,  # after every document; a stop token
    "<|fim_prefix|>": 200_002, "<|fim_middle|>": 200_003, "<|fim_suffix|>": 200_004,  # fill in the middle
    "<|header_start|>": 200_005, "<|header_end|>": 200_006,  # around a message's role
    "<|eom|>": 200_007,  # end of a message after which another of the same turn comes; a stop token
    "<|eot|>": 200_008,  # end of a turn; a stop token
    "<|step|>": 200_009,
    "<|python_start|>": 200_016, "<|python_end|>": 200_017,  # around code to be run
    "<|finetune_right_pad|>": 200_018,
    "<|image_start|>": 200_080, "<|image_end|>": 200_081,
    "<|tile_x_separator|>": 200_084, "<|tile_y_separator|>": 200_085,
    "<|image|>": 200_090,  # before the patches of the whole image
    "<|patch|>": 200_092,  # whose embedding the vision tower's output replaces
    "<|reasoning_thinking_start|>": 201_142, "<|reasoning_thinking_end|>": 201_143,
}  # fmt: skip
"""The special tokens that have a meaning, with their ids; the other ids from 200,000 to 202,047 are reserved."""
ROLES = {"system": "<|eot|>", "user": "<|eot|>", "assistant": "<|eot|>", "ipython": "<|eom|>"}
"""Who may speak, and what ends their message. `ipython` is the result of a tool, after which the assistant goes on."""

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
    """Ids 0 to 199,999 are byte-pair ranks, those above are special (`SPECIAL_IDS`)."""

    # tiktoken's regular expressions overflow their stack near a million characters without a break.
    LONGEST = 400_000

    def __init__(self, model: bytes):
        super().__init__(model)
        ranks = parse_ranks(model)
        if sorted(ranks.values()) != list(range(RANKS)):
            raise ValueError(f"Llama 4's tokenizer has the ranks 0 to {RANKS - 1:,}; this file has {len(ranks):,}")
        self._bpe = tiktoken.Encoding("llama4", pat_str=O200K_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = RANKS + SPECIALS
        self.bos_id, self.eos_id = SPECIAL_IDS["<|begin_of_text|>"], SPECIAL_IDS["<|end_of_text|>"]
        self.pad_id = SPECIAL_IDS["<|finetune_right_pad|>"]

    def ids(self, text: str) -> np.ndarray:
        parts = [text[i : i + self.LONGEST] for i in range(0, len(text), self.LONGEST)] or [""]
        # tiktoken's own encode_to_numpy looks for special tokens first, which takes twice as long as all of this.
        arrays = [np.frombuffer(array("i", self._bpe.encode_ordinary(part)), np.int32) for part in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def special(self, name: str) -> int | None:
        return SPECIAL_IDS.get(name)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._bpe.decode([int(i) for i in ids if i < RANKS])

    def render_chat(self, messages: Sequence[Mapping[str, str]], reply: bool = False) -> np.ndarray:
        """Ids, int32 [T], of messages {"role": ..., "content": ...}: bos, then of each its header, content and end.

        The same as `chat_text`, but that the names of special tokens in a content are ordinary text. No eos follows.
        """
        start, end = SPECIAL_IDS["<|header_start|>"], SPECIAL_IDS["<|header_end|>"]
        ids = [self.bos_id]
        for role, content in _checked(messages):
            # The header's newlines are tokens of their own, whatever the content begins with.
            ids += [start, *self.encode(role), end, *self.encode("\n\n"), *self.encode(content)]
            ids.append(SPECIAL_IDS[ROLES[role]])
        if reply:
            ids += [start, *self.encode("assistant"), end, *self.encode("\n\n")]
        return np.array(ids, np.int32)


def parse_ranks(model: bytes) -> dict[bytes, int]:
    """The rank of each token in a file of tiktoken's lines "base64 rank"."""
    pairs = (line.split() for line in model.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def chat_text(messages: Sequence[Mapping[str, str]], reply: bool = False) -> str:
    """Messages in Llama 4's chat form, special tokens by their names; for people to read.

        <|begin_of_text|><|header_start|>user<|header_end|>\\n\\nHello<|eot|>

    `reply` adds the header of the assistant's message that a model is to write. ValueError names the message that is
    of no known role, or holds anything but a role and a text.
    """
    text = "<|begin_of_text|>" + "".join(
        f"<|header_start|>{role}<|header_end|>\n\n{content}{ROLES[role]}" for role, content in _checked(messages)
    )
    return text + "<|header_start|>assistant<|header_end|>\n\n" * reply


def _checked(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    for number, message in enumerate(messages, 1):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ValueError(f"message {number} has {', '.join(sorted(message)) or 'nothing'}: expected a role and, as "
                             "text, a content")  # fmt: skip
        if message["role"] not in ROLES:
            raise ValueError(f"message {number} has the role {message['role']!r}: one of {', '.join(ROLES)}")
    return [(message["role"], message["content"]) for message in messages]


def installed() -> epath.Path:
    """The tokenizer file of the installed llama-models package, which is not imported."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the tokenizer {INSTALLED!r} is that of the llama-models package: run pip install 'llama4_jax[llama]'"
        )
    return epath.Path(next(iter(spec.submodule_search_locations))) / "llama4" / "tokenizer.model"
