"""Weights of any kind of checkpoint, a slice at a time: a run's, or a folder's in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

from llama4_jax import hf
from llama4_jax.config import ModelConfig
from training.checkpoint_arrays import Arrays
from training.hf_import import open_folder
from training.model_folder import CONFIG
from training.safetensors_header import read_json

Ranges = Mapping[str, tuple[int, int]]


@runtime_checkable
class Weights(Protocol):
    """What both kinds offer."""

    where: str
    cfg: ModelConfig

    def read(self, path: hf.Path, index: tuple[int, ...] = (), ranges: Ranges = {}) -> np.ndarray:  # noqa: B006
        """What stands at `index` (a block; a block and an expert) of a stacked weight, fp32; (first, last) of letters
        that are not whole."""
        ...


class FolderWeights:
    """Of a Hugging Face folder."""

    def __init__(self, folder: epath.PathLike, vision: bool = True):
        self.where, self.folder = str(folder), open_folder(folder, vision)
        self.cfg = self.folder.cfg

    @cached_property
    def _tensors(self) -> dict[tuple[hf.Path, tuple[int, ...]], tuple[hf.Tensor, int]]:
        return {(path, t.index): (t, i) for t in self.folder.table for i, path in enumerate(t.paths)}

    def read(self, path: hf.Path, index: tuple[int, ...] = (), ranges: Ranges = {}) -> np.ndarray:  # noqa: B006
        if (path, index) in self._tensors:
            t, i = self._tensors[path, index]
            return t.ours(self.folder.stored[t.name].box(t.theirs(ranges)[i])).astype(np.float32)
        if len(index) == 2:  # an expert out of fused ones
            return self.read(path, index[:1], {**ranges, "E": (index[1], index[1] + 1)})[0]
        return np.stack([self.read(path, (*index, e), ranges) for e in range(self.cfg.num_experts)])


class RunWeights:
    """Of one learner of a run."""

    def __init__(self, run: epath.PathLike, learner: str | None = None, step: int | None = None):
        self.arrays = Arrays(run, learner, step)
        self.where = f"{run}@{self.arrays.step}"
        self.cfg = self.arrays.model

    def read(self, path: hf.Path, index: tuple[int, ...] = (), ranges: Ranges = {}) -> np.ndarray:  # noqa: B006
        array = self.arrays.array(path)[index]
        letters = str(path[-1]).rsplit("_", 1)[1][-array.ndim :]
        place = tuple(slice(*ranges.get(c, (0, n))) for c, n in zip(letters, array.shape, strict=True))
        return np.asarray(array[place].read().result()).astype(np.float32)


def find_run(place: str) -> tuple[str, int | None] | None:
    """(the run's folder, step or None for the newest) of RUN or RUN@STEP, None for a folder in Hugging Face's format;
    FileNotFoundError where it is neither."""
    run, at, step = place.rpartition("@")
    if not at or not step.isdecimal() or epath.Path(place).exists():
        run, step = place, ""
    if (epath.Path(run) / "checkpoints").exists():
        return run, int(step) if step else None
    if (epath.Path(place) / CONFIG).exists() and "model_type" in read_json(epath.Path(place) / CONFIG):
        return None
    raise FileNotFoundError(f"{place} is neither a run's folder (RUN or RUN@STEP) nor one in Hugging Face's format")


def open_weights(place: str, learner: str | None = None) -> Weights:
    """Of any kind of place, raising as `find_run`."""
    run = find_run(place)
    return FolderWeights(place) if run is None else RunWeights(run[0], learner, run[1])
