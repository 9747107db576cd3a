"""Documents with images: how records spell them, and how they become tokens and tiles.

A record's images are its "image" or its "images" (a list): encoded bytes, the same in base64 (as JSON has it), an
object with "bytes" (as Parquet and Hugging Face's datasets have it), or pixels, uint8 [height, width] or
[height, width, 1, 3 or 4]. In its text <|image|> stands for each, in order; where there is none, the images stand in
front of the text. In the text of a record without images <|image|> is text like any other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.batch import ImageShape
from data.images import MOST_TILES, NAMES, BadImage, decode, tile, to_rgb, tokens_of
from data.tokenizer import Tokenizer

MARK = NAMES["image"]
FIELDS = ("image", "images")
MOST_IMAGES = 48  # of a document


class Illustrated(str):
    """A text in which MARK stands for each of its images; at most `most` tiles are made of one."""

    __slots__ = ("images", "most")
    images: tuple[bytes | np.ndarray, ...]
    most: int

    def __new__(cls, text: str, images: tuple[bytes | np.ndarray, ...], most: int = MOST_TILES):
        self = super().__new__(cls, text)
        self.images, self.most = images, most
        return self

    @property
    def raw(self) -> bytes:
        """What its hash is of: the text and a digest of each image."""
        return self.encode() + b"".join(blake2b(_bytes(image), digest_size=16).digest() for image in self.images)

    @property
    def size(self) -> int:
        """Bytes, of the text and the images as they are stored."""
        return len(self.encode()) + sum(len(_bytes(image)) for image in self.images)


class Images(NamedTuple):
    """The images of a tokenised document."""

    tiles: np.ndarray  # uint8 [n, S, S, 3], in order
    slots: np.ndarray  # int32 [T], which tile token stands at a position, -1 for none
    inside: np.ndarray  # bool [T], tokens of images, from start to end: nothing learns to predict them
    starts: np.ndarray  # int32 [images], where the first token of each stands


def _bytes(image: bytes | np.ndarray) -> bytes:
    return image if isinstance(image, bytes) else repr(image.shape).encode() + image.tobytes()


def has_images(record: Mapping[str, Any]) -> bool:
    return any(record.get(name) is not None for name in FIELDS)


def illustrated(text: str, record: Mapping[str, Any], check: bool = False) -> Illustrated:
    """A record's text with its images; ValueError says what is wrong. `check`: decode the images, to see if they are
    any."""
    given = [record[name] for name in FIELDS if record.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f'both "{FIELDS[0]}" and "{FIELDS[1]}"')
    found = given[0] if isinstance(given[0], list | tuple) else [given[0]]
    if not 1 <= len(found) <= MOST_IMAGES:
        raise ValueError(f"{len(found)} images, where 1 to {MOST_IMAGES} can be")
    images = tuple(_stored(image, f"image {n}" * (len(found) > 1) or "image") for n, image in enumerate(found, 1))
    marks = text.count(MARK)
    if marks not in (0, len(images)):
        raise ValueError(f"{len(images)} images, where the text has {MARK} {marks} times")
    text = text if marks else MARK * len(images) + text
    for n, image in enumerate(images if check else (), 1):
        try:
            picture(image)
        except BadImage as error:
            raise BadImage(f"image {n}: {error}") from None
    return Illustrated(text, images, int(record.get("most_tiles", MOST_TILES)))


def _stored(image: Any, what: str) -> bytes | np.ndarray:
    if isinstance(image, Mapping):
        image = image.get("bytes")
    if isinstance(image, str):
        try:
            image = base64.b64decode(image.encode(), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{what} is no base64 ({error})") from error
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4)):
            return image
        raise ValueError(f"{what} is an array {list(image.shape)}, not [height, width, 1, 3 or 4]")
    raise ValueError(f"{what} is {type(image).__name__}: expected encoded bytes, base64, or pixels (uint8)")


def picture(image: bytes | np.ndarray) -> Image.Image:
    """In RGB; `BadImage` for what is none."""
    if isinstance(image, bytes):
        return decode(image)
    return to_rgb(Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image))


def tokenise(
    text: str, tokenizer: Tokenizer, shape: ImageShape | None, most: int = MOST_TILES
) -> tuple[np.ndarray, Images | None]:
    """A whole document: its tokens, int32 [T], bos first and eos last, and its images if it has any.

    ValueError where it has images and the run has no room for any (`shape`), or the tokenizer no tokens for them.
    """
    if not isinstance(text, Illustrated):
        return tokenizer.document(text), None
    ids = tokenizer.image_ids
    if shape is None or not shape.tiles:
        raise ValueError(f"{text[:40]!r} has images, for which train.tiles leaves no room: set it above 0 for a model "
                         "with a vision tower, or leave this source out")  # fmt: skip
    if ids is None:
        raise ValueError(f"the tokenizer has no special tokens {', '.join(NAMES.values())}, which images need")
    parts: list[np.ndarray] = [np.array([tokenizer.bos_id], np.int32)]
    tiles: list[np.ndarray] = []
    inside = [np.zeros(1, bool)]
    starts: list[int] = []
    for n, words in enumerate(text.split(MARK)):
        if n:
            cut = tile(picture(text.images[n - 1]), shape.size, min(most, text.most))
            tiles.append(cut.tiles)
            starts.append(sum(map(len, parts)))
            parts.append(tokens_of(cut.grid, ids, shape.tokens))
            inside.append(np.ones(len(parts[-1]), bool))
        if words:
            parts.append(tokenizer.ids(words))
            inside.append(np.zeros(len(parts[-1]), bool))
    parts.append(np.array([tokenizer.eos_id], np.int32))
    inside.append(np.zeros(1, bool))
    tokens = np.concatenate(parts)
    within, every = np.concatenate(inside), np.concatenate(tiles)
    patches = (tokens == ids.patch) & within
    if patches.sum() != len(every) * shape.tokens:
        raise ValueError(f"{text[:40]!r}: {patches.sum()} patch tokens for {len(every)} tiles of {shape.tokens} each")
    slots = np.where(patches, np.cumsum(patches) - 1, -1).astype(np.int32)
    return tokens, Images(every, slots, within, np.array(starts, np.int32))
