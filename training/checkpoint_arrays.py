"""The arrays of a run's checkpoint one slice at a time: read of any, through TensorStore; written of weights alone.

`training/checkpoint.py` saves and restores whole states that live on devices. This is for weights that need not fit
into memory: an export reads them chunk by chunk, an import writes them so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from flax import nnx

from llama4_jax import hf
from llama4_jax.config import ModelConfig
from llama4_jax.text import abstract
from training import manifest
from training.checkpoint import CHUNK_BYTES, Checkpoints, which_learner
from training.config import RunConfig
from training.record import config_from_json
from training.transfer import pwrite

ZARR = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
Digests = dict[str, str]
"""SHA-256 of files, in hex, by their path."""


class Arrays:
    """One learner's weights in a run's checkpoint."""

    def __init__(self, folder: epath.PathLike, learner: str | None = None, step: int | None = None):
        """The newest checkpoint by default; the learner must be named where the run has several. ValueError or
        FileNotFoundError say what is missing."""
        self.folder = epath.Path(folder)
        with Checkpoints(self.folder) as checkpoints:
            self.step = checkpoints.find(step)
            checkpoints.check_good(self.step)
        self.state = self.folder / "checkpoints" / str(self.step) / "state"
        self.record = json.loads((self.state.parent / "run" / "metadata").read_text())
        self.config: RunConfig = config_from_json(self.record["config"])
        self.learner = which_learner(self.config, learner, folder)
        self.model: ModelConfig = self.config.learners[self.learner].model
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 2**24}})
        self._open: dict[hf.Path, ts.TensorStore] = {}

    @cached_property
    def _ocdbt(self) -> bool:
        return (self.state / "manifest.ocdbt").exists()

    def array(self, path: hf.Path) -> ts.TensorStore:
        """The stacked weight at that path; ValueError where the checkpoint has none, or one of another shape."""
        if path not in self._open:
            name = array_name(self.learner, path)
            base = url(self.state)
            kvstore: Any = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self._ocdbt else f"{base}{name}/"
            spec = {
                "driver": "zarr",
                "kvstore": kvstore,
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            }
            try:
                array = ts.open(spec, context=self._context, open=True, read=True).result()
            except ValueError as error:
                raise ValueError(f"{self.state} has no readable array {name}: {str(error)[:200]}") from None
            if path in self.shapes and array.shape != self.shapes[path]:
                raise ValueError(f"{self.state}: {name} is {list(array.shape)}, its configuration has "
                                 f"{list(self.shapes[path])}")  # fmt: skip
            self._open[path] = array
        return self._open[path]

    def chunk(self, path: hf.Path) -> tuple[int, ...]:
        """Shape of a stored chunk."""
        layout: Any = self.array(path).chunk_layout
        return tuple(layout.read_chunk.shape)

    @cached_property
    def shapes(self) -> dict[hf.Path, tuple[int, ...]]:
        """What the configuration says."""
        return weight_shapes(self.model)

    def identity(self) -> str:
        """Names the checkpoint: the digest of its manifest, which has those of all files."""
        return manifest.name_of(self.state.parent)


def weight_shapes(cfg: ModelConfig) -> dict[hf.Path, tuple[int, ...]]:
    """Shapes of a model's weights by path."""
    return {path: tuple(p.get_value().shape) for path, p in nnx.to_flat_state(nnx.split(abstract(cfg))[1])}


def array_name(learner: str, path: hf.Path) -> str:
    """Under which a checkpoint holds a weight (`training.checkpoint.named_leaves`)."""
    return f"learners.{learner}.params." + ".".join(map(str, path))


def url(folder: epath.Path) -> str:
    """A folder as TensorStore names it."""
    text = os.fspath(folder)
    return f"{text.rstrip('/')}/" if "://" in text else f"file://{os.path.abspath(text)}/"


# --- a checkpoint of weights alone ---------------------------------------------------------------------------------


def chunk_sizes(t: hf.Tensor, itemsize: int) -> dict[str, int]:
    """Of a chunk in each of our letters, for a weight of one place of layers and experts.

    One expert; an eighth of D, over which training shards, so that a device reads little beside its own; of the letter
    that leads their tensor as much as `CHUNK_BYTES` hold, so that what is written at once lies together there.
    """
    sizes = {letter: t.sizes[letter] for letter in t.letters}
    if len(t.groups) == 3:
        sizes[t.groups[0]] = 1
    lead = rows_letter(t)
    if lead != "D" and "D" in sizes and math.prod(sizes.values()) * itemsize >= 2**25:
        sizes["D"] = -(-sizes["D"] // 8)
    elif lead == "D":
        sizes["D"] = -(-sizes["D"] // (8 if math.prod(sizes.values()) * itemsize >= 2**25 else 1))
    rest = math.prod(n for letter, n in sizes.items() if letter != lead) * itemsize
    most = max(1, CHUNK_BYTES // rest)
    sizes[lead] = -(-sizes[lead] // -(-sizes[lead] // most))
    return sizes


def rows_letter(t: hf.Tensor) -> str:
    """The letter in which their tensor can be cut into stretches of its file: of each expert by itself, if fused."""
    return t.groups[1][0] if len(t.groups) == 3 else t.groups[0][0]


def pieces(t: hf.Tensor, chunk: Mapping[str, int], most: int) -> Iterator[dict[str, tuple[int, int]]]:
    """Their tensor from its first byte to its last, in pieces: ranges of our letters, which are whole chunks.

    `most`: elements that a piece should have; it has at least a chunk's rows.
    """
    lead = rows_letter(t)
    joined = next(group for group in t.groups if group[0] == lead)[1:]
    row = math.prod(t.sizes[letter] for letter in joined) * (t.shape[-1] if len(t.groups) > 1 else 1)
    step = min(chunk[lead], t.sizes[lead])
    step *= max(1, most // (row * step))
    experts: list[dict[str, tuple[int, int]]] = [{}]
    if len(t.groups) == 3:
        experts = [{t.groups[0]: (e, e + 1)} for e in range(t.shape[0])]
    for expert in experts:
        for first in range(0, t.sizes[lead], step):
            yield expert | {lead: (first, min(first + step, t.sizes[lead]))}


def create_array(state: epath.Path, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> Any:
    """An array without compression, or the one of this form that is there already; its chunks are files."""
    metadata = {"shape": shape, "chunks": chunks, "dtype": ZARR.get(dtype, dtype), "compressor": None}
    return ts.open(
        {"driver": "zarr", "kvstore": f"{url(state)}{name}/", "metadata": metadata,
         "store_data_equal_to_fill_value": True}, open=True, create=True,
    ).result()  # fmt: skip


def write_chunks(folder: epath.Path, chunk: tuple[int, ...], first: tuple[int, ...], values: np.ndarray) -> Digests:
    """Write whole chunks of an array that `create_array` made in this local folder, from the place `first`; unsynced.

    Each is a file of its numbers in C order, filled up with zeros where the array ends before it does (the Zarr format,
    version 2, without a compressor), written from its first byte to its last; its digest is taken on the way, as
    TensorStore gives none, and a second reading costs as much as the writing.
    """
    digests: Digests = {}
    values = values.view(f"u{values.itemsize}")  # NumPy transposes its own types faster
    for index in np.ndindex(*(-(-n // c) for n, c in zip(values.shape, chunk, strict=True))):
        part = values[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))]
        if part.shape != chunk:
            part = np.pad(part, [(0, c - n) for n, c in zip(part.shape, chunk, strict=True)])
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        key = ".".join(str(a // c + i) for a, c, i in zip(first, chunk, index, strict=True))
        with open(folder / key, "wb", buffering=0) as f:
            pwrite(f.fileno(), data, 0)
        digests[key] = sha256(data).hexdigest()
    return digests


def write_metadata(
    step: epath.Path,
    arrays: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    digests: Digests | None = None,
    **items: Any,
) -> None:
    """What makes of arrays, given with their shapes and chunks, a checkpoint that Orbax restores; with the JSON `items`
    beside. `digests`: of files below `step` that are known. To be written last."""
    handler = "orbax.checkpoint._src.handlers."
    tree = {
        f"('{name}',)": {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(chunks)},
        }
        for name, (_, chunks) in arrays.items()
    }
    flags = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    chunked = [
        {"array_metadata": {"param_name": name, "write_shape": chunks, "chunk_shape": chunks, "ext_metadata": None}}
        for name, (_, chunks) in arrays.items()
    ]
    (step / "state" / "array_metadatas").mkdir(parents=True, exist_ok=True)
    (step / "state" / "array_metadatas" / "process_0").write_text(json.dumps({"array_metadatas": chunked}))
    for name, value in items.items():
        (step / name).mkdir(exist_ok=True)
        (step / name / "metadata").write_text(json.dumps(value))
    handlers = {"state": f"{handler}pytree_checkpoint_handler.PyTreeCheckpointHandler"}
    handlers |= dict.fromkeys(items, f"{handler}json_checkpoint_handler.JsonCheckpointHandler")
    about = {"item_handlers": handlers, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": 0,
             "commit_timestamp_nsecs": 0, "custom_metadata": {}}  # fmt: skip
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    (step / "state" / "_METADATA").write_text(json.dumps({"tree_metadata": tree, **flags, "custom_metadata": None}))
    for place in (*(step / name for name in ("state", *items)), step):  # on stores without rename these say: complete
        (place / "commit_success.txt").write_text("written whole\n")
    manifest.write(step, known=digests)
