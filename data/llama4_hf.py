"""Llama 4's tokenizer as the files that Hugging Face's AutoTokenizer reads: `tokenizer.json` and its configuration."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from data.llama4_tokenizer import O200K_PATTERN, RANKS, SPECIAL_IDS, SPECIALS, Llama4Tokenizer, parse_ranks
from data.tokenizer import CONFIG_FILE, HF_FILE

STOPS = tuple(SPECIAL_IDS[name] for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>"))
"""Ids that end what a model writes."""
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('this text model reads text alone') }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|eom|>' if message['role'] == 'ipython' else '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"
)
"""The text of `data.llama4_tokenizer.chat_text`, in Jinja. Its ids are those of `render_chat` but where a content
begins with a newline, which joins the header's, or names a special token."""
NO_IMAGES = "{% else %}{{ raise_exception('this text model reads text alone') }}"
IMAGES = "{% elif part['type'] == 'image' %}<|image|>{% else %}{{ raise_exception('text and images alone are read') }}"
"""What stands in a whole model's template for the former: a processor puts an image's tokens there."""


def write(tokenizer: Llama4Tokenizer, folder: epath.Path, images: bool = False) -> None:
    """Write both files beside the `tokenizer.model`, of which they are another form; `images`: chats may hold them."""
    made = tokenizer_json(parse_ranks(tokenizer.model_bytes))
    (folder / HF_FILE).write_text(json.dumps(made, ensure_ascii=False))
    template = CHAT_TEMPLATE.replace(NO_IMAGES, IMAGES) if images else CHAT_TEMPLATE
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad|>", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], "chat_template": template,
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """A byte-level BPE whose merges are those that make each token of its two parts of lower rank.

    `ranks`: of tokens, in which every single byte is one; a rank is the token's id.
    """
    letters = byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = _parts(ranks, token)
        if len(parts) == 2:  # a token that its own merges do not reach is found as a whole word (ignore_merges)
            merges.append([spelled[part] for part in parts])
    names = {i: name for name, i in SPECIAL_IDS.items()}
    special = [
        dict(id=i, content=names.get(i, f"<|reserved_special_token_{i - RANKS}|>"), single_word=False, lstrip=False,
             rstrip=False, normalized=False, special=True)
        for i in range(RANKS, RANKS + SPECIALS)
    ]  # fmt: skip
    bos = "<|begin_of_text|>"
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False},
            byte_level,
        ]},
        "post_processor": {
            "type": "TemplateProcessing", "single": one,
            "pair": [*one, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [SPECIAL_IDS[bos]], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()}, "merges": merges,
        },
    }  # fmt: skip


def _parts(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The token as merges of a rank below its own leave it."""
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while True:
        found = [
            (rank, i) for i in range(len(parts) - 1) if (rank := ranks.get(parts[i] + parts[i + 1], limit)) < limit
        ]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]
