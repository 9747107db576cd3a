"""Whether a Hugging Face folder is whole, means the same to another implementation of Llama 4, and is its source's.

Three questions, each in memory that does not grow with the model but by a layer: are all tensors there, in their shapes
and with the digests of the manifest (`check_files`); do this project's layers and another implementation's give the
same, layer by layer (`verify`); and are the weights those of the checkpoint that was exported (`training/diff.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from etils import epath

from training.hf_import import Folder, open_folder
from training.layerwise import TILES, Model, Numpy, Ours, Transformers, vision_error
from training.model_folder import read_config, read_manifest
from training.quantised import Dequantised
from training.safetensors_header import ALL_DTYPES, Reader, Stored, stored_tensors
from training.transfer import Progress
from training.weights import FolderWeights

Against = Literal["transformers", "numpy"]
MARGIN = 1e-5
"""Two router logits closer than this, relative to the largest, may change places by rounding alone."""
COLUMNS = 2**14
"""Of the vocabulary, whose logits are compared at once."""


@dataclass(frozen=True)
class Verification:
    """How far our logits are from another implementation's, on the same weights and tokens in fp32."""

    against: str
    """The other implementation: transformers, or numpy (`training/oracle.py`)."""

    max_relative_error: float
    """max |ours - theirs| / max |theirs| over all tokens and the vocabulary."""
    router_margin: float
    """Smallest gap between the last expert chosen and the first that was not, relative to the largest logit."""
    tolerance: float
    """What the error may be."""
    dtype: str
    """As which the weights are stored."""
    tokens: int
    """Length of the sequences compared."""
    chunks: int
    """Chunks of local attention they touch."""
    near_tie: bool = False
    """Wherever a row begins to differ, a token at or before that place lies between two experts (below `MARGIN`)."""
    tiles: int = 0
    """Of images, whose tokens count in the error like logits; 0 for a text model, and against numpy."""
    stages: tuple[tuple[str, float], ...] = ()
    """The same error behind the embedding, each layer and the final norm, of the residual stream."""

    @property
    def ok(self) -> bool:
        return self.max_relative_error <= self.tolerance

    @property
    def undecided(self) -> bool:
        """The logits differ, but tokens were so near to another expert that rounding can have moved them."""
        return not self.ok and self.near_tie

    @property
    def first_beyond(self) -> str | None:
        """Where the error first exceeds the tolerance."""
        return next((name for name, error in self.stages if not error <= self.tolerance), None)

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "undecided, compared" if self.undecided else "NOT EQUAL"
        where = f", first beyond it at {self.first_beyond}" if self.first_beyond and not self.ok else ""
        seen = f", {self.tiles} tiles" if self.tiles else ""
        hint = "; a token lies between two experts: repeat with another seed" if self.undecided else ""
        return (
            f"{verdict} to {self.against}: max |a - b| / max |b| = {self.max_relative_error:.2e} "
            f"(tolerance {self.tolerance:.0e}{where}), router margin {self.router_margin:.2e}, {self.dtype} weights, "
            f"{self.tokens} tokens over {self.chunks} chunks{seen}{hint}"
        )


def verify(
    folder: epath.PathLike,
    tolerance: float = 1e-4,
    tokens: int | None = None,
    *,
    against: Against = "transformers",
    batch: int = 2,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> Verification:
    """Run a folder's model here and in another implementation (fp32, CPU), a layer at a time, and compare.

    `against`: transformers (eager attention; ValueError where it is not installed), or the NumPy oracle, which needs
    nothing. `tokens`: length of the `batch` random sequences; by default three and a half chunks, at most 4096 tokens
    (eager attention holds T^2 scores a head). A layer of the model, twice in fp32, must fit into memory. `say` takes a
    line for each stage.
    """
    weights = FolderWeights(folder, vision=False)
    cfg, of_images = weights.cfg, 0.0
    whole = against == "transformers" and read_config(folder).vision is not None
    if whole:
        of_images = vision_error(folder, seed)
        say(f"vision: max |a - b| / max |b| = {of_images:.2e}")
    tokens = min(3 * cfg.chunk + cfg.chunk // 2, 4096) if tokens is None else tokens
    ids_BT = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, tokens), dtype=np.int32)
    theirs: Model = Transformers(weights) if against == "transformers" else Numpy(weights)
    ours = Ours(weights)
    stages: list[tuple[str, float]] = []
    margins: list[np.ndarray] = []
    for a, b in zip(ours.stages(ids_BT), theirs.stages(ids_BT), strict=True):
        assert a.name == b.name
        error = float(np.max(np.abs(a.x_BTD - b.x_BTD)) / max(float(np.max(np.abs(b.x_BTD))), 1e-30))
        stages.append((a.name, error))
        say(f"{a.name}: max |a - b| / max |b| = {error:.2e}")
        if b.router_RE is not None:
            margins.append(router_margins(b.router_RE, cfg.experts_per_token))
    error_BT, largest = np.zeros((batch, tokens)), 0.0
    for first in range(0, cfg.vocab_size, COLUMNS):
        last = min(first + COLUMNS, cfg.vocab_size)
        a_BTV, b_BTV = ours.logits(first, last), theirs.logits(first, last)
        error_BT = np.maximum(error_BT, np.max(np.abs(a_BTV - b_BTV), axis=-1))  # NaN stays
        largest = max(largest, float(np.max(np.abs(b_BTV))))
    error_BT /= largest
    margin_BT = np.min(margins, axis=0).reshape(batch, tokens)
    return Verification(
        against=against,
        max_relative_error=max(float(np.max(error_BT)), of_images),
        tiles=TILES if whole else 0,
        router_margin=float(margin_BT.min()),
        near_tie=starts_at_ties(error_BT, margin_BT, tolerance),
        tolerance=tolerance,
        dtype=_dtypes(weights.folder),
        tokens=tokens,
        chunks=-(-tokens // cfg.chunk),
        stages=tuple(stages),
    )


def _dtypes(folder: Folder) -> str:
    stored = [folder.stored[t.name] for t in folder.table]
    codes = {s.codes.dtype if isinstance(s, Dequantised) else s.dtype for s in stored}
    return ", ".join(sorted("packed integer" if code == "I32" else ALL_DTYPES[code].name for code in codes))


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """What a look at the files found."""

    tensors: int
    bytes: int
    digests: bool
    """Whether the manifest's digests were there, and were compared."""
    problems: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        what = "digests as in the manifest" if self.digests else "no manifest, so digests were not compared"
        for first in self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            return f"NOT WHOLE: {first}{more}"
        return f"whole: {self.tensors} tensors, {self.bytes / 1e9:.2f} GB, shapes and dtypes as they should be, {what}"


def check_files(folder: epath.PathLike, threads: int = 4, log: Callable[[str], object] | None = None) -> Files:
    """Names, shapes and dtypes of every tensor (ValueError names the first that is wrong), and every digest of the
    manifest (`problems` has a line for each tensor that has another, or that either lacks)."""
    folder = epath.Path(folder)
    open_folder(folder)
    stored = stored_tensors(folder)
    total = sum(s.nbytes for s in stored.values())
    manifest = read_manifest(folder)
    wanted = manifest.get("sha256")
    problems: list[str] = []
    if wanted is not None:
        problems += [f"tensor {name} is in the manifest alone" for name in sorted(wanted.keys() - stored.keys())]
        problems += [f"tensor {name} is not in the manifest" for name in sorted(stored.keys() - wanted.keys())]
        progress = Progress("digests", total, 0, log)
        both = [name for name in stored if name in wanted]
        with ThreadPoolExecutor(threads) as pool:
            for name, found in zip(both, pool.map(partial(_digest, stored, progress), both), strict=True):
                if found != wanted[name]:
                    problems.append(f"tensor {name} in {stored[name].file} is not what was exported: another digest")
        progress.close()
    return Files(len(stored), total, wanted is not None, tuple(problems), manifest)


def _digest(stored: dict[str, Stored], progress: Progress, name: str) -> str:
    entry, found = stored[name], sha256()
    buffer = np.empty(min(entry.nbytes, 2**24), np.uint8)
    with Reader(entry.file) as reader:
        for start in range(0, entry.nbytes, 2**24):
            part = buffer[: min(2**24, entry.nbytes - start)]
            reader.into([part.data], entry.start + start)
            found.update(part.data)
            progress.add(len(part))
    return found.hexdigest()


# --- near ties -----------------------------------------------------------------------------------------------------


def starts_at_ties(error_BT: np.ndarray, margin_BT: np.ndarray, tolerance: float) -> bool:
    """Whether every row that differs begins to do so at or behind a near tie: an expert that changes moves only later
    positions, so a difference before the first tie has another cause."""
    for error_T, margin_T in zip(error_BT, margin_BT, strict=True):
        wrong = np.flatnonzero(~(error_T <= tolerance))
        if wrong.size and margin_T[: wrong[0] + 1].min() >= MARGIN:
            return False
    return True


def router_margins(logits_RE: np.ndarray, k: int) -> np.ndarray:
    """Of each token, (k-th largest - next) / max |logits| of all; infinite if every expert is chosen."""
    if k == logits_RE.shape[1]:
        return np.full(len(logits_RE), np.inf)
    sorted_RE = np.sort(logits_RE, axis=1)
    return (sorted_RE[:, -k] - sorted_RE[:, -k - 1]) / np.max(np.abs(logits_RE))


def router_margin(logits_RE: np.ndarray, k: int) -> float:
    """The smallest of `router_margins`."""
    return float(np.min(router_margins(logits_RE, k)))
