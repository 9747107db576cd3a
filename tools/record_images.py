"""Record how transformers preprocesses images for Llama 4: `python -m tools.record_images`.

Writes tests/golden/images.npz: of images of many sizes and modes, the grid, the token ids that AutoProcessor makes of a
prompt, and every few pixels of the tiles. Its image processor needs torchvision, which does not import beside the torch
that the extra [verify] takes here, so this has an environment of its own:

    python -m venv golden && golden/bin/pip install torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 pillow
    golden/bin/python -m tools.record_images

Images are not stored: `image_of` draws them from their size, here and in tests/data/test_images.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images import NAMES, processor_files

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "images.npz"
SIZE, PATCH_SIZE, SHUFFLE = 336, 14, 2
STRIDE = 31  # every so many pixels of a tile, both ways
PROMPT = "What is this?\n<|image|> Say it."
SIZES = [  # (height, width)
    (1, 1), (1, 336), (336, 1), (2, 3), (10, 10), (100, 100), (100, 335), (335, 336), (336, 336), (336, 337),
    (337, 336), (337, 337), (300, 800), (800, 300), (480, 640), (640, 480), (500, 500), (671, 672), (672, 672),
    (673, 672), (672, 1008), (1008, 672), (1, 2000), (2000, 1), (50, 3000), (3000, 50), (333, 5376), (5376, 336),
    (768, 1024), (1024, 768), (1080, 1920), (1920, 1080), (1008, 1008), (1344, 1344), (1345, 1343), (1500, 1500),
    (900, 1600), (700, 1400), (1400, 701), (200, 1700), (1700, 200), (427, 640), (333, 500), (375, 1242), (2160, 1440),
    (257, 811), (1111, 777), (64, 64),
]  # fmt: skip
MODES = ("L", "LA", "RGBA", "P", "1", "CMYK")


def image_of(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Slopes, stripes and noise, the same for a size wherever it is drawn."""
    rng = np.random.default_rng([height, width])
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * y / height, 255 * x / width, 127 * (1 + np.sign(np.sin(x / 7 + y / 5)))], axis=-1)
    pixels = np.clip(slopes * 0.6 + rng.integers(0, 103, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(pixels[:, :, 0]))
    return image if image.mode == mode else image.convert(mode)


def cases() -> dict[str, Image.Image]:
    """Every size in RGB, and one size in the other modes."""
    sizes = {f"{h}x{w}": image_of(h, w) for h, w in SIZES}
    return sizes | {f"350x400-{mode}": image_of(350, 400, mode) for mode in MODES}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of bytes and the special tokens of images."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # pyright: ignore[reportMissingImports]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>", *NAMES.values()]
    model.add_special_tokens([AddedToken(name, special=True) for name in names])
    model.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=names[0], eos_token=names[1], pad_token=names[2])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    from transformers import AutoProcessor  # pyright: ignore[reportMissingImports]

    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder)
        for file, content in processor_files(SIZE, PATCH_SIZE, SHUFFLE).items():
            (folder / file).write_text(json.dumps(content))
        (folder / "config.json").write_text(json.dumps(dict(model_type="llama4")))
        processor: Any = AutoProcessor.from_pretrained(folder)
        for case, image in cases().items():
            out = processor(images=[image], text=PROMPT, return_tensors="pt")
            grid = processor.image_processor([image], return_tensors="pt")["aspect_ratios"][0]
            pixels = out["pixel_values"].float().numpy().transpose(0, 2, 3, 1)
            levels = np.rint((pixels[:, ::STRIDE, ::STRIDE] + 1) * 127.5)
            record[f"{case}.grid"] = np.array(grid.tolist(), np.int8)
            record[f"{case}.ids"] = out["input_ids"][0].numpy().astype(np.int16)
            record[f"{case}.pixels"] = levels.astype(np.uint8)
            print(f"{case}: {tuple(grid.tolist())}, {len(pixels)} tiles, {len(record[f'{case}.ids'])} tokens")
    np.savez_compressed(GOLDEN, **record)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
