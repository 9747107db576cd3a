"""Preprocessing of images is the reference's (golden files of `tools/record_images.py`), and survives bad ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from PIL import Image

from data.hf_tokenizer import HFTokenizer
from data.images import (
    MOST_PIXELS,
    BadImage,
    ImageIds,
    canvases,
    choose_canvas,
    decode,
    tile,
    to_rgb,
    tokens_of,
)
from data.tokenizer import SentencePieceTokenizer, train_bpe
from tools.record_images import GOLDEN, PATCH_SIZE, PROMPT, SHUFFLE, SIZE, STRIDE, cases, write_tokenizer

TILE_TOKENS = (SIZE // PATCH_SIZE // SHUFFLE) ** 2


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def test_grids_and_pixels_equal_the_references():
    """On every size and mode; the largest difference of a pixel is one level of 255."""
    names, worst = set(), 0
    for name, image in cases().items():
        ours = tile(to_rgb(image), SIZE)
        theirs = golden()[f"{name}.pixels"].astype(int)
        assert ours.grid == tuple(golden()[f"{name}.grid"]), name
        sampled = ours.tiles[:, ::STRIDE, ::STRIDE].astype(int)
        assert sampled.shape == theirs.shape, name
        worst = max(worst, int(np.abs(sampled - theirs).max()))
        names.add(name)
    assert len(names) >= 40 and {f"{name}.grid" for name in names} == {n for n in golden() if n.endswith(".grid")}
    assert worst <= 1


def test_token_strings_equal_autoprocessors(tmp_path):
    """The prompt's text by the same tokenizer, around the image's tokens."""
    pytest.importorskip("tokenizers", reason="tokenizer.json files need the extra [hf-tokenizers]")
    write_tokenizer(tmp_path)
    tokenizer = HFTokenizer(*((tmp_path / f"tokenizer{x}.json").read_bytes() for x in ("", "_config")))
    assert tokenizer.image_ids is not None
    before, after = map(tokenizer.encode, PROMPT.split("<|image|>"))
    for name in (n.removesuffix(".ids") for n in golden() if n.endswith(".ids")):
        rows, cols = golden()[f"{name}.grid"].tolist()
        ours = [*before, *tokens_of((rows, cols), tokenizer.image_ids, TILE_TOKENS).tolist(), *after]
        assert ours == golden()[f"{name}.ids"].tolist(), name


def test_there_are_fifty_canvases():
    assert len(canvases()) == len(set(canvases())) == 50
    assert choose_canvas(1080, 1920, 336) == (3, 5)
    assert choose_canvas(100, 100, 336) == (1, 1)


def test_lengths_of_token_strings():
    ids = ImageIds(1, 2, 3, 4, 5, 6)
    assert tokens_of((1, 1), ids, 2).tolist() == [1, 5, 6, 6, 2]
    assert tokens_of((1, 2), ids, 1).tolist() == [1, 6, 3, 6, 4, 5, 6, 2]
    for rows, cols in canvases():
        expected = 147 + (rows * cols > 1) * (rows * cols * 144 + rows * cols)
        assert len(tokens_of((rows, cols), ids, 144)) == expected


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_what_is_unusual_is_read():
    rgb = decode(encoded(picture()))
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(picture()))
    clear = picture("RGBA")
    clear.putalpha(0)
    assert np.asarray(decode(encoded(clear))).min() == 255  # transparent is white
    frames = [picture("P"), Image.new("P", (40, 30))]
    animated = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.asarray(animated).std() > 10  # the first frame
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert decode(encoded(picture(), "JPEG", exif=exif)).size == (30, 40)
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert np.asarray(decode(encoded(deep))).tolist() == [[[128] * 3] * 4] * 4
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "LAB", "I", "F"):
        assert decode(encoded(picture(mode), "TIFF" if mode not in ("P", "LA") else "PNG")).mode == "RGB"


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(data)) + part(b"IEND", b"")


def malformed(count: int) -> Iterator[bytes]:
    """Images of every format, cut short, with bytes changed, parts removed or doubled; and things that are none."""
    rng = np.random.default_rng(0)
    good = [encoded(picture(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")]
    yield from (b"", b"\x00" * 40, b"not an image", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", png_of(0, 5), png_of(5, 0))
    yield from (png_of(2**20, 2**20), png_of(2**31 - 1, 1), png_of(9000, 9000), png_of(100, 100, b"\x00" * 10))
    for n in range(count - 11):
        data = bytearray(good[n % len(good)])
        kind = n // len(good) % 4
        if kind == 0:
            del data[rng.integers(1, len(data)) :]
        elif kind == 1:
            for at in rng.integers(0, len(data), 12):
                data[at] = rng.integers(0, 256)
        elif kind == 2:
            at = int(rng.integers(0, len(data) - 8))
            del data[at : at + int(rng.integers(1, 200))]
        else:
            data[: int(rng.integers(1, 30))] = rng.bytes(8)
        yield bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds in them
def test_three_hundred_malformed_images():
    """Each is refused in a line, or is read as some image all the same; none does anything else."""
    bad = 0
    for data in malformed(300):
        try:
            image = decode(data)
        except BadImage as error:
            bad += 1
            assert "\n" not in str(error) and len(str(error)) < 250
        else:
            assert image.mode == "RGB" and tile(image, 28).tiles.dtype == np.uint8
    assert bad > 150


def test_bombs_are_not_unpacked():
    with pytest.raises(BadImage, match="more than 67,108,864"):
        decode(png_of(9000, 9000))
    assert MOST_PIXELS < 9000 * 9000


def test_special_tokens_of_images_are_of_the_trained_tokenizer():
    texts = [f"a few words of text, number {n}" for n in range(300)]
    plain, images = (SentencePieceTokenizer(train_bpe(texts, 320, images=on)) for on in (False, True))
    assert plain.image_ids is None and images.image_ids is not None
    assert len(set(images.image_ids)) == 6
    assert not set(images.encode("<|image|> <|patch|>")) & set(images.image_ids)
