"""Between weights and folders in Hugging Face's format: streamed export and checked import.

A folder holds `config.json`, shards in the safetensors format and `model.safetensors.index.json`. Format of a shard:
the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of every tensor), the
tensors' bytes one behind the other (https://github.com/huggingface/safetensors#format). It is read and written here
a tensor at a time, because a model need not fit into the host's memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from data.tokenizer import Tokenizer
from llama4_jax import hf
from llama4_jax.config import ModelConfig
from llama4_jax.text import abstract

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""What weights may be stored as, by the format's names; all of them go into fp32 exactly."""
CODES = {"float32": "F32", "bfloat16": "BF16"}
"""What weights can be exported as."""
INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


# --- export --------------------------------------------------------------------------------------------------------


def save_hf(
    params: nnx.State,
    cfg: ModelConfig,
    folder: epath.PathLike,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `params` (the state of a `Transformer(cfg)`) as a folder that transformers loads as Llama4ForCausalLM.

    One tensor of theirs is in host memory at a time. `config.json` and the index are written last, on a local disk
    into a folder beside `folder` that is then renamed: what an interrupted export leaves never looks complete.
    Every process of a multi-host run calls this; the first one writes. Raises ValueError if `folder` holds anything
    already, if the weights are not those of `cfg`, or if a router has a bias that is not 0.
    """
    folder = epath.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder: name a new one for the export")
    table = list(hf.tensors(cfg))
    weights = _weights(_without_bias(params, cfg), table)
    shards = _plan_shards(table, DTYPES[CODES[dtype]].itemsize, shard_bytes)
    multihost_utils.sync_global_devices(f"save_hf checked {folder}")  # before the first process creates anything
    writes = jax.process_index() == 0
    # Object stores have no rename; there the missing config and index alone mark what is not complete.
    work = folder if "://" in os.fspath(folder) else folder.with_name(f".{folder.name}.partial")
    if writes:
        if work.exists():
            work.rmtree()
        work.mkdir(parents=True)
    for file, shard in shards.items():
        arrays = (
            t.to_hf(*(_on_host(weights[path], t.block).astype(DTYPES[CODES[dtype]]) for path in t.paths)) for t in shard
        )
        with (work / file).open("wb") if writes else nullcontext() as f:
            if f is not None:
                f.write(_header(shard, dtype))
            for array in arrays:  # every process takes part in gathering
                if f is not None:
                    f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if writes:
        _write_meta(work, cfg, shards, dtype, tokenizer)
        if work != folder:
            work.rename(folder)
    multihost_utils.sync_global_devices(f"save_hf wrote {folder}")


def _without_bias(params: nnx.State, cfg: ModelConfig) -> nnx.State:
    """The weights that Hugging Face's model has; ValueError if the ones it has not change anything."""
    if not cfg.router_bias:
        return params
    kept, largest = [], {}
    for path, p in nnx.to_flat_state(params):
        if path[-1] == hf.ROUTER_BIAS:
            i: Any = path[2]  # of the layer, within a block
            by_block = np.abs(_on_host(p.get_value(), None)).max(axis=1)
            largest |= {block * cfg.period + i: float(b) for block, b in enumerate(by_block)}
        else:
            kept.append((path, p))
    if nonzero := [layer for layer, b in largest.items() if b != 0]:
        worst = max(nonzero, key=lambda layer: largest[layer])
        raise ValueError(
            f"export: the router's bias is not 0 in {len(nonzero)} of {len(largest)} MoE layers, largest in layer "
            f"{worst} ({largest[worst]:.2g}), and Hugging Face's Llama 4 has none: train to the last step, after which "
            "it is 0, or export a later checkpoint"
        )
    return nnx.from_flat_state(kept)


def _weights(params: nnx.State, table: list[hf.Tensor]) -> dict[hf.Path, jax.Array]:
    """The weights by path, checked against the table: all there, none left over, in the right shapes."""
    weights = {path: p.get_value() for path, p in nnx.to_flat_state(params)}
    expected: dict[hf.Path, tuple[int, ...]] = {}
    for t in table:
        stacked = () if t.block is None else (t.block + 1,)  # the last block of a weight stands
        expected |= dict.fromkeys(t.paths, (*stacked, *t.our_shape))
    for path in [*expected, *(weights.keys() - expected.keys())]:
        got = tuple(weights[path].shape) if path in weights else "nothing"
        want = expected.get(path, "nothing")
        if got != want:
            raise ValueError(
                f"export: weight {'.'.join(map(str, path))} is {got}, the model's configuration has {want}"
            )
    return weights


def _plan_shards(table: list[hf.Tensor], itemsize: int, shard_bytes: int) -> dict[str, list[hf.Tensor]]:
    """Tensors in order, cut into files of at most `shard_bytes` (or of one tensor that is larger)."""
    shards: list[list[hf.Tensor]] = []
    room = -1
    for t in table:
        size = math.prod(t.shape) * itemsize
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(t)
        room -= size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


_take = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False))


def _on_host(weight: jax.Array, block: int | None) -> np.ndarray:
    """One layer's weight, gathered from wherever its shards lie."""
    if block is not None:
        weight = _take(weight, jnp.int32(block))
    if weight.is_fully_addressable:
        return np.asarray(weight)
    return np.asarray(multihost_utils.process_allgather(weight, tiled=True))


def _header(shard: list[hf.Tensor], dtype: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in shard:
        start, end = end, end + math.prod(t.shape) * DTYPES[CODES[dtype]].itemsize
        entries[t.name] = {"dtype": CODES[dtype], "shape": t.shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors start aligned
    return len(header).to_bytes(8, "little") + header


def _write_meta(
    work: epath.Path, cfg: ModelConfig, shards: dict[str, list[hf.Tensor]], dtype: str, tokenizer: Tokenizer | None
) -> None:
    """Tokenizer, index and configuration, in this order: with the last one the folder is complete."""
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(work)
    total = sum(math.prod(t.shape) for shard in shards.values() for t in shard) * DTYPES[CODES[dtype]].itemsize
    weight_map = {t.name: file for file, shard in shards.items() for t in shard}
    (work / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    (work / CONFIG).write_text(json.dumps({**hf.config_to_hf(cfg), **ids, "torch_dtype": dtype}, indent=2))


# --- import --------------------------------------------------------------------------------------------------------


def read_config(folder: epath.PathLike) -> ModelConfig:
    """The model that a Hugging Face folder holds; of a model with vision, its text part."""
    return hf.config_from_hf(read_json(epath.Path(folder) / CONFIG))


def load_hf(folder: epath.PathLike, *, shardings: Any = None, router_bias: bool = False) -> nnx.State:
    """The weights of a Hugging Face folder in fp32, as the state of `abstract(read_config(folder))`.

    `router_bias`: of that model with such a bias, at 0 as theirs has none.
    `shardings`: a tree of that structure with a `jax.sharding.Sharding` for each weight; by default everything goes
    onto the first device. One tensor of theirs is in host memory at a time, of experts only the rows that the local
    devices hold. Before anything is placed, every expected tensor must be there with its shape and a dtype of
    `DTYPES`, and none may be left over but the vision parts of a whole model: ValueError names the first that is not.
    """
    folder = epath.Path(folder)
    config = read_json(folder / CONFIG)
    whole = hf.is_whole_model(config)
    cfg = replace(hf.config_from_hf(config), router_bias=router_bias)
    table = list(hf.tensors(cfg, hf.TEXT_PREFIX if whole else ""))
    stored = stored_tensors(folder)
    _check_stored(table, stored, hf.OTHER_PARTS if whole else ())

    state = nnx.split(abstract(cfg))[1]
    leaves, structure = jax.tree.flatten(state)
    places = [SingleDeviceSharding(jax.local_devices()[0])] * len(leaves)
    places = places if shardings is None else jax.tree.leaves(shardings)
    if len(places) != len(leaves):
        raise ValueError(f"load_hf: shardings for {len(places)} weights, the model has {len(leaves)}")
    place = {path: p.get_value() for path, p in nnx.to_flat_state(jax.tree.unflatten(structure, places))}
    shape = {path: p.get_value().shape for path, p in nnx.to_flat_state(state)}
    weights: dict[hf.Path, jax.Array] = {}
    for t in table:
        layer_place = {path: place[path] if t.block is None else _layer_sharding(place[path]) for path in t.paths}
        rows = _local_rows(t, layer_place.values())
        arrays = t.from_hf(stored[t.name].read(*rows))
        for path, array in zip(t.paths, arrays, strict=True):
            layer = _put(array, t.our_shape, rows[0], layer_place[path])
            if t.block is None:
                weights[path] = layer
                continue
            empty, write = _stacker(shape[path], place[path])
            weights[path] = write(weights[path] if path in weights else empty(), layer, jnp.int32(t.block))
    for path in (path for path in shape if path[-1] == hf.ROUTER_BIAS):
        weights[path] = _stacker(shape[path], place[path])[0]()
    return nnx.from_flat_state([(path, p.replace(weights[path])) for path, p in nnx.to_flat_state(state)])


def _layer_sharding(stacked: Sharding) -> Sharding:
    """Where one layer of a stacked weight lies."""
    return (
        NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:])) if isinstance(stacked, NamedSharding) else stacked
    )


def _local_rows(t: hf.Tensor, shardings: Iterable[Sharding]) -> tuple[int, int]:
    """The rows of their tensor that this process's devices need: all, unless rows mean the same on both sides."""
    if not t.same_rows:
        return 0, t.shape[0]
    slices = [
        index[0].indices(t.shape[0])
        for sharding in shardings
        for index in sharding.addressable_devices_indices_map(t.our_shape).values()
        if index is not None
    ]
    return min(start for start, _, _ in slices), max(stop for _, stop, _ in slices)


def _put(array: np.ndarray, shape: tuple[int, ...], first_row: int, sharding: Sharding) -> jax.Array:
    """`array`, which begins at row `first_row` of a weight of `shape`, onto the devices in fp32."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return np.array(array[(slice(start - first_row, stop - first_row), *index[1:])], np.float32)

    return jax.make_array_from_callback(shape, sharding, part, dtype=np.float32)


@cache
def _stacker(shape: tuple[int, ...], sharding: Sharding) -> tuple[Callable[[], jax.Array], Callable[..., jax.Array]]:
    """Make an empty stacked weight; write a layer into one, in place."""
    empty = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)
    write = jax.jit(partial(jax.lax.dynamic_update_index_in_dim, axis=0), donate_argnums=0, out_shardings=sharding)
    return empty, write


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (exclusive)."""
        dtype = DTYPES[self.dtype]
        row = math.prod(self.shape[1:]) * dtype.itemsize
        with self.file.open("rb") as f:
            f.seek(self.start + first * row)
            data = f.read((last - first) * row)
        return np.frombuffer(data, dtype).reshape(last - first, *self.shape[1:])


def stored_tensors(folder: epath.Path) -> dict[str, Stored]:
    """Every tensor of the folder's shards, by name."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX}: 'weight_map' is missing")
    elif (folder / SINGLE).exists():
        weight_map = dict.fromkeys(_read_header(folder / SINGLE), SINGLE)
    else:
        raise FileNotFoundError(f"{folder} holds neither {INDEX} nor {SINGLE}")
    stored: dict[str, Stored] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", file):
            raise ValueError(f"{folder / INDEX}: {file!r} is not the name of a file in this folder")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing; {INDEX} names it")
        for name, entry in _read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise ValueError(f"{folder / file} holds tensor {name}, which {INDEX} does not place there")
            stored[name] = entry
    if missing := weight_map.keys() - stored.keys():
        raise ValueError(
            f"{folder}: tensor {min(missing)} is not in {weight_map[min(missing)]}, where {INDEX} places it"
        )
    return stored


def _read_header(file: epath.Path) -> dict[str, Stored]:
    """A shard's tensors; ValueError where the header is not one, or the tensors do not fill the file exactly."""
    size = file.stat().length
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} is not in the safetensors format, or is cut short: a header of {length} bytes")
        header = _parse_json(f.read(length), file)
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    end = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            known = dtype not in DTYPES or stop - start == math.prod(shape) * DTYPES[dtype].itemsize
            if start != end or stop < start or not known or any(n < 1 for n in shape):
                raise ValueError(
                    f"{file}: tensor {name} of shape {shape} in {dtype} cannot lie at bytes {start} to {stop}"
                )
            tensors[name] = Stored(file, dtype, shape, 8 + length + start)
            end = stop
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: the header is not in the safetensors format ({error!r})") from None
    if size != 8 + length + end:
        raise ValueError(f"{file} has {size} bytes, its header describes {8 + length + end}")
    return tensors


def _check_stored(table: list[hf.Tensor], stored: dict[str, Stored], others: tuple[str, ...]) -> None:
    for t in table:
        if t.name not in stored:
            raise ValueError(f"tensor {t.name} is missing: expected shape {t.shape}")
        got = stored[t.name]
        if got.shape != t.shape:
            raise ValueError(f"tensor {t.name} in {got.file} has shape {got.shape}, expected {t.shape}")
        if got.dtype not in DTYPES:
            raise ValueError(
                f"tensor {t.name} in {got.file} has dtype {got.dtype}, expected one of {', '.join(DTYPES)}"
            )
    left = stored.keys() - {t.name for t in table}
    if left := sorted(name for name in left if not name.startswith(others)):
        raise ValueError(f"tensor {left[0]} in {stored[left[0]].file} is none of this model's ({len(left)} left over)")


def read_json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: not a folder in Hugging Face's format")
    return _parse_json(file.read_bytes(), file)


def _parse_json(text: bytes, file: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value
