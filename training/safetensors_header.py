"""Shards in the safetensors format: their headers, checked before anything of them is used, and slices read by pread.

A shard is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of every tensor)
and the tensors' bytes one behind the other (https://github.com/huggingface/safetensors#format). Nothing is mapped into
memory: mapped pages count as the process's own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from training.manifest import SAFE_NAME

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""What weights may be stored as, by the format's names; all of them go into fp32 exactly."""
ALL_DTYPES = DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip
"""Those, and what holds quantised ones."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 100_000_000
MAX_DIMENSIONS = 8
GAP = 2**15
"""Stretches of a file that lie closer are read with what is between them."""
VECTOR = 1024
"""Buffers that one call of the system fills (IOV_MAX)."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ALL_DTYPES[self.dtype].itemsize

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (exclusive)."""
        return self.box(((first, last), *((0, n) for n in self.shape[1:])))

    def whole(self) -> np.ndarray:
        return self.box([(0, n) for n in self.shape])

    def box(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """The box of these (first, last) in each dimension, in as few reads as it has stretches that lie apart."""
        dtype = ALL_DTYPES[self.dtype]
        out = np.empty([b - a for a, b in ranges], dtype)
        strides = [math.prod(self.shape[i + 1 :]) * dtype.itemsize for i in range(len(self.shape))]
        # Read are items of this dimension one behind the other, with all that the dimensions behind it have.
        inner = max(len(ranges) - 1, 0)
        while inner and ranges[inner] == (0, self.shape[inner]):
            inner -= 1
        while inner and (self.shape[inner] - out.shape[inner]) * strides[inner] < GAP:
            inner -= 1
        base = self.start + sum(a * strides[i] for i, (a, _) in enumerate(ranges[: inner + 1]))
        beside = ranges[inner + 1 :]
        exact = all(ab == (0, n) for ab, n in zip(beside, self.shape[inner + 1 :], strict=True))
        nbytes = (out.shape[inner] if out.shape else 1) * (strides[inner] if strides else dtype.itemsize)
        flat = out.reshape(-1).view(np.uint8)
        with Reader(self.file) as reader:
            for n, index in enumerate(np.ndindex(*out.shape[:inner])):
                offset = base + sum(i * strides[dim] for dim, i in enumerate(index))
                if exact:
                    reader.into([flat[n * nbytes : (n + 1) * nbytes].data], offset)
                    continue
                # Some rows at a time, which are cut to the box in memory.
                step = max(1, 2**24 // strides[inner])
                for first in range(0, out.shape[inner], step):
                    rows = min(step, out.shape[inner] - first)
                    wide = np.empty((rows, *self.shape[inner + 1 :]), dtype)
                    reader.into([wide.reshape(-1).view(np.uint8).data], offset + first * strides[inner])
                    cut = wide[(slice(None), *(slice(a, b) for a, b in beside))]
                    out[index][first : first + rows] = cut
        return out

    def split(self, ranges: Sequence[tuple[int, int]], parts: int) -> list[np.ndarray]:
        """A box that is one stretch of the file, cut into `parts` along its last dimension as it is read."""
        dtype = ALL_DTYPES[self.dtype]
        *outer, last = (b - a for a, b in ranges)
        if last != self.shape[-1] or any(n != 1 for n in outer[:-1]):
            raise ValueError(f"split: {list(ranges)} is not one stretch of a tensor of shape {self.shape}")
        out = [np.empty((*outer, last // parts), dtype) for _ in range(parts)]
        first = sum(a * math.prod(self.shape[i + 1 :]) for i, (a, _) in enumerate(ranges)) * dtype.itemsize
        rows = [part.reshape(-1, last // parts).view(np.uint8) for part in out]
        with Reader(self.file) as reader:
            some = VECTOR // parts
            for row in range(0, len(rows[0]), some):
                buffers = [part[i].data for i in range(row, min(row + some, len(rows[0]))) for part in rows]
                reader.into(buffers, self.start + first + row * last * dtype.itemsize)
        return out


class Reader:
    """A file read at places: by pread where it is local."""

    def __init__(self, file: epath.Path):
        self._file = file
        local = "://" not in os.fspath(file)
        self._fd = os.open(file, os.O_RDONLY) if local else None
        self._stream = None if local else file.open("rb")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
        if self._stream is not None:
            self._stream.close()

    def into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill buffers of bytes one after the other from there; ValueError where the file ends before."""
        left = [buffer for buffer in buffers if len(buffer)]
        while left:
            if self._fd is not None:
                got = os.preadv(self._fd, left, offset)
            else:
                assert self._stream is not None
                self._stream.seek(offset)
                data = memoryview(self._stream.read(sum(map(len, left))))
                got = len(data)
                for buffer, end in zip(left, itertools.accumulate(map(len, left)), strict=True):
                    part = data[end - len(buffer) : min(end, got)]
                    buffer[: len(part)] = part
            if got == 0:
                raise ValueError(f"{self._file} ended at byte {offset} while it was read")
            offset += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]


# --- reading -------------------------------------------------------------------------------------------------------


def stored_tensors(folder: epath.Path) -> dict[str, Stored]:
    """Every tensor of the folder's shards, by name; ValueError or FileNotFoundError names what is wrong first."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{folder / INDEX}: 'weight_map' is missing, or is not a mapping of names to files")
    elif (folder / SINGLE).exists():
        weight_map = dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    else:
        raise FileNotFoundError(f"{folder} holds neither {INDEX} nor {SINGLE}")
    stored: dict[str, Stored] = {}
    for file in sorted({*weight_map.values()}):
        if not SAFE_NAME.fullmatch(file):
            raise ValueError(f"{folder / INDEX}: {file!r} is not the name of a file in this folder")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing; {INDEX} names it")
        for name, entry in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise ValueError(f"{folder / file} holds tensor {name}, which {INDEX} does not place there")
            stored[name] = entry
    if missing := weight_map.keys() - stored.keys():
        raise ValueError(
            f"{folder}: tensor {min(missing)} is not in {weight_map[min(missing)]}, where {INDEX} places it"
        )
    return stored


def read_header(file: epath.Path) -> dict[str, Stored]:
    """A shard's tensors; ValueError where the header is not one, or the tensors do not fill the file exactly."""
    if "://" not in os.fspath(file) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError(f"{file} is not a regular file")
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
        for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), _offsets(entry)
            sizes = all(type(n) is int and 1 <= n < 2**48 for n in shape) and len(shape) <= MAX_DIMENSIONS
            known = isinstance(dtype, str) and (
                dtype not in ALL_DTYPES or (sizes and stop - start == math.prod(shape) * ALL_DTYPES[dtype].itemsize)
            )
            if start != end or stop < start or not known or not sizes:
                raise ValueError(
                    f"{file}: tensor {name!r} of shape {str(shape)[:100]} in {dtype!a:.20} cannot lie at bytes "
                    f"{start} to {stop}"
                )
            tensors[name] = Stored(file, dtype, shape, 8 + length + start)
            end = stop
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: the header is not in the safetensors format ({error!r})") from None
    if size != 8 + length + end:
        raise ValueError(f"{file} has {size} bytes, its header describes {8 + length + end}")
    return tensors


def _offsets(entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (None, None)
    if type(start) is not int or type(stop) is not int or start < 0:
        raise TypeError("data_offsets")
    return start, stop


def read_json(file: epath.Path, limit: int = 10_000_000) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: not a folder in Hugging Face's format")
    if (size := file.stat().length) > limit:
        raise ValueError(f"{file} has {size} bytes; at most {limit} are read")
    return _parse_json(file.read_bytes(), file)


def _parse_json(text: bytes, file: epath.Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a name stands there twice")
        return value

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value


# --- writing -------------------------------------------------------------------------------------------------------


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a shard that holds these (name, dtype, shape), up to where the first one's bytes stand."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ALL_DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors start aligned
    return len(header).to_bytes(8, "little") + header


def index_text(shards: Mapping[str, Sequence[tuple[str, str, tuple[int, ...]]]]) -> str:
    """The index of shards that hold these (name, dtype, shape)."""
    total = sum(math.prod(shape) * ALL_DTYPES[dtype].itemsize for some in shards.values() for _, dtype, shape in some)
    weight_map = {name: file for file, some in shards.items() for name, _, _ in some}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
