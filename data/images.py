"""Images to tiles and tokens, as Llama 4's own preprocessing makes them: deterministic, in the data's workers.

**Tiles.** A tile is S pixels square. An image goes onto a canvas of a x b tiles (rows x columns), a b <= `most`: with
s = min(aS / h, bS / w), the canvas of the smallest s >= 1 if there is any, else of the largest s; of several the one of
least area. It is scaled, keeping its aspect, to fit th = min(max(h, S), aS), tw = min(max(w, S), bS) (bilinear,
antialiased), padded with black at the right and bottom, and cut row by row. With more than one tile a last one shows
the whole image, stretched to S x S. Pixels stay bytes: that 0..255 becomes -1..1 is the model's business.

**Tokens.** One tile: start, image, its patches, end. More: start; row by row the patches of each tile, with a separator
between columns and another one behind every row; image, the patches of the whole, end. The text model's embeddings of
the patches are replaced by what the vision tower makes of the tiles, in this order.

**Bad images** raise `BadImage`, with a line that says what is wrong, whatever Pillow raises: those that are no image,
are cut short, or have more than MOST_PIXELS. Transparency is laid on white, EXIF's orientation is followed, of an
animation the first frame is taken, 16 bits a colour become 8. (Meta's `llama-models` and `transformers`'
Llama4ImageProcessor, beside which tests hold all this.)
"""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

MOST_PIXELS = 2**26
"""Of an image as stored: 67 million; a larger one is taken for a decompression bomb."""
MOST_TILES = 16
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is decoded: no format that runs programs (EPS) or that nobody trains on."""
NAMES = dict(
    start="<|image_start|>", end="<|image_end|>", column="<|tile_x_separator|>", row="<|tile_y_separator|>",
    image="<|image|>", patch="<|patch|>",
)  # fmt: skip
"""The special tokens around and within an image."""


class BadImage(ValueError):
    """Bytes that are no image, or one that cannot be used."""


class ImageIds(NamedTuple):
    """A tokenizer's ids of `NAMES`."""

    start: int
    end: int
    column: int
    row: int
    image: int
    patch: int


class Tiled(NamedTuple):
    """An image as the model sees it."""

    tiles: np.ndarray  # uint8 [n, S, S, 3], the whole image last where n > 1
    grid: tuple[int, int]  # rows and columns of tiles


@cache
def canvases(most: int = MOST_TILES) -> tuple[tuple[int, int], ...]:
    """Every (rows, columns) of at most so many tiles, in the order in which ties are decided."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(most, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return tuple(canvas for some in by_ratio.values() for canvas in some)


def choose_canvas(height: int, width: int, size: int, most: int = MOST_TILES) -> tuple[int, int]:
    """(rows, columns) of tiles for an image; scales are compared in fp32, as the reference does."""
    options = canvases(most)
    sides = np.array(options, np.float32) * np.float32(size)
    scales = np.minimum(sides[:, 0] / np.float32(height), sides[:, 1] / np.float32(width))
    enlarging = scales[scales >= 1]
    chosen = enlarging.min() if len(enlarging) else scales.max()
    return min((o for o, s in zip(options, scales, strict=True) if s == chosen), key=lambda o: o[0] * o[1])


def fitted(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of that aspect inside a box."""
    by_height, by_width = box[0] / height, box[1] / width
    if by_width < by_height:
        return max(1, min(int(height * by_width), box[0])), box[1]
    return box[0], max(1, min(int(width * by_height), box[1]))


def tile(image: Image.Image, size: int, most: int = MOST_TILES) -> Tiled:
    """An RGB image as tiles of `size` pixels."""
    width, height = image.size
    rows, cols = choose_canvas(height, width, size, most)
    box = min(max(height, size), rows * size), min(max(width, size), cols * size)
    new_height, new_width = fitted(height, width, box)
    canvas = np.zeros((rows * size, cols * size, 3), np.uint8)
    canvas[:new_height, :new_width] = _resized(image, new_height, new_width)
    tiles = canvas.reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(image, size, size)[None]])
    return Tiled(tiles, (rows, cols))


def _resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def small_picture(tile: np.ndarray, side: int) -> str:
    """A tile of at most so many pixels a side, as PNG in base64."""
    image, file = Image.fromarray(np.asarray(tile)), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def tokens_of(grid: tuple[int, int], ids: ImageIds, tile_tokens: int) -> np.ndarray:
    """The token string of an image of so many rows and columns of tiles, int32."""
    (rows, cols), patches = grid, [ids.patch] * tile_tokens
    out = [ids.start]
    if rows * cols > 1:
        row = patches + ([ids.column, *patches]) * (cols - 1) + [ids.row]
        out += row * rows
    return np.array([*out, ids.image, *patches, ids.end], np.int32)


def processor_files(size: int, patch_size: int, shuffle: int) -> dict[str, dict]:
    """What `transformers`' AutoProcessor needs beside a tokenizer to do the same: contents by the files' names."""
    half = [0.5, 0.5, 0.5]
    image = dict(
        image_processor_type="Llama4ImageProcessor", size=dict(height=size, width=size), max_patches=MOST_TILES,
        do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=2, rescale_factor=1 / 255,
        image_mean=half, image_std=half, resize_to_max_canvas=False, processor_class="Llama4Processor",
    )  # fmt: skip
    text = dict(processor_class="Llama4Processor", patch_size=patch_size, pixel_shuffle_ratio=1 / shuffle,
                fake_image_token=NAMES["image"])  # fmt: skip
    return {"preprocessor_config.json": image, "processor_config.json": text}


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image, upright, in RGB; `BadImage` with a line for what cannot be."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise BadImage(f"an image of {width} x {height} pixels")
            if width * height > MOST_PIXELS:
                raise BadImage(f"an image of {width} x {height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        kind = "empty" if not data else f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadImage(f"{len(data):,} bytes that are {kind}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error).partition(",")[0]) from None
    except Exception as error:  # Pillow's decoders raise nearly anything at damaged files
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"a damaged image ({why[:120]})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a colour, transparency on white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
