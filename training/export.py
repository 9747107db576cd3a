"""A run's checkpoint as a folder in Hugging Face's format, streamed.

A checkpoint of any size goes out in bounded memory: slices are read from its arrays, turned into Hugging Face's
layout, and written to their places in shards that were laid out before. Each tensor is written from its first byte to
its last by one thread, which takes its digest on the way. Index, manifest and configuration come last, and a local
folder gets its name only then.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices

from llama4_jax import hf
from llama4_jax.config import ModelConfig
from training import model_folder, quantised
from training.checkpoint_arrays import Arrays, array_name, pieces
from training.manifest import files as all_files
from training.safetensors_header import ALL_DTYPES, DTYPES, header_bytes
from training.transfer import (
    Budget,
    Journal,
    Progress,
    check_space,
    fsync,
    power_of_two,
    pwrite,
    read_journal,
    run_all,
    workplace,
)

CODES = {"float32": "F32", "bfloat16": "BF16"}
"""What weights can be exported as."""
SHARD_BYTES = 5_000_000_000
MAX_MEMORY = 2_000_000_000
PIECE_BYTES = 2**26
"""What a piece should have in the shard."""

Shards = dict[str, list["Output"]]


@dataclass(frozen=True)
class Output:
    """A tensor of the folder."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ALL_DTYPES[self.code].itemsize


@dataclass(frozen=True)
class Job:
    """What becomes of a tensor: one of the same name, or the parts of a quantised one."""

    tensor: hf.Tensor
    outputs: tuple[Output, ...]
    dtype: np.dtype  # in which its slices are read
    convert: Callable[[np.ndarray], Sequence[np.ndarray]] = field(default=lambda x: (x,), repr=False)
    """A slice in their layout -> the next bytes of each output."""
    constant: tuple[np.ndarray, ...] = field(default=(), repr=False)
    """All of the outputs behind those."""


# --- from a checkpoint ---------------------------------------------------------------------------------------------


def export_run(
    arrays: Arrays,
    folder: epath.PathLike,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    quant: quantised.Scheme | None = None,
    about: model_folder.About,
    max_memory: int = MAX_MEMORY,
    threads: int = 4,
    shard_bytes: int = SHARD_BYTES,
    log: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Write a run's checkpoint as a folder that transformers loads as Llama4ForCausalLM; returns its manifest.

    `max_memory` bounds the bytes of this process in memory. Every process of a job of several calls this, with a folder
    that all of them see, and writes its share. What a kill leaves is gone on with by the same call; on an object store,
    shard by shard. Raises ValueError if `folder` holds anything already, if the checkpoint's arrays are not those of
    its configuration, if a router has a bias that is not 0, and if memory or disk do not suffice.
    """
    folder = epath.Path(folder)
    check_new(folder)
    model_folder.image_ids(arrays.model, about.tokenizer)
    budget = Budget(max_memory)
    _check_bias_stored(arrays)
    jobs = plan_jobs(arrays.model, dtype, quant)
    plan = _Plan(arrays, jobs, plan_shards([o for job in jobs for o in job.outputs], shard_bytes), budget, threads)
    plan.check()
    local = "://" not in os.fspath(folder)
    work = folder.with_name(f".{folder.name}.partial") if local else folder
    identity = dict(source=arrays.identity(), learner=arrays.learner, dtype=dtype, shard_bytes=shard_bytes,
                    quant=quant and quant.name, jobs=len(jobs), piece_bytes=plan.piece_bytes)  # fmt: skip
    first = jax.process_index() == 0
    with ExitStack() as stack:
        if local and first:
            stack.enter_context(workplace(work, identity))
            if not list(work.glob("*.safetensors")):
                check_space(folder, sum(o.nbytes for some in plan.shards.values() for o in some))
            for file in plan.shards:
                _lay_out(work / file, plan.shards[file])
        sync_global_devices(f"export laid out {folder}")
        digests = _local(plan, work, log) if local else _remote(plan, work, identity, log)
        sync_global_devices(f"export wrote {folder}")
        if first:
            if local:
                for journal in work.glob("journal-*.jsonl"):
                    digests |= {o: d for e in read_journal(journal).values() for o, d in e.get("sha256", {}).items()}
            digests = {o.name: digests[o.name] for some in plan.shards.values() for o in some}  # in their order
            manifest = _manifest(arrays, digests, identity, dtype, quant)
            index = {file: [(o.name, o.code, o.shape) for o in some] for file, some in plan.shards.items()}
            model_folder.write(work, arrays.model, index, dtype, about, manifest, quant)
            if local:
                fsync(all_files(work).values())
                for leftover in [*work.glob("journal-*.jsonl"), work / "plan.json"]:
                    leftover.unlink()
                work.rename(folder)
                fsync([folder])
            else:
                (work / ".journal").rmtree()
        sync_global_devices(f"export named {folder}")
    return json.loads((folder / model_folder.MANIFEST).read_text())


def plan_jobs(cfg: ModelConfig, dtype: str, quant: quantised.Scheme | None) -> list[Job]:
    """Every tensor of the model, with what becomes of it."""
    jobs = []
    for t in hf.tensors(cfg, per_expert=quant is not None):
        if quant is not None and quantised.applies(t.name):
            outputs = tuple(Output(*o) for o in quant.outputs(t.name, t.shape))
            constant = (np.array(t.shape, np.int64),) * (len(outputs) - 2)
            jobs.append(Job(t, outputs, np.dtype(np.float32), quant.quantise, constant))
        else:
            jobs.append(Job(t, (Output(t.name, CODES[dtype], t.shape),), DTYPES[CODES[dtype]]))
    return jobs


def plan_shards(outputs: Sequence[Output], shard_bytes: int) -> Shards:
    """Tensors in order, cut into files of at most `shard_bytes` (or of one tensor that is larger)."""
    shards: list[list[Output]] = []
    room = -1
    for o in outputs:
        if o.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(o)
        room -= o.nbytes
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


class _Plan:
    """What is read, in which pieces, and where it goes."""

    def __init__(self, arrays: Arrays, jobs: list[Job], shards: Shards, budget: Budget, threads: int):
        self.arrays, self.jobs, self.shards, self.budget, self.threads = arrays, jobs, shards, budget, threads
        # A power of two, so that what the process needs as it starts changes nothing: the journal counts pieces.
        self.piece_bytes = power_of_two(min(PIECE_BYTES, budget.total // threads // 4))
        self.place: dict[str, tuple[str, int]] = {}
        for file, some in shards.items():
            offset = len(shard_header(some))
            for o in some:
                self.place[o.name] = (file, offset)
                offset += o.nbytes

    def mine(self, weighed: Sequence[tuple[Any, int]]) -> list[Any]:
        """This process's part of things with weights."""
        loads = [0] * jax.process_count()
        kept = []
        for thing, weight in sorted(weighed, key=lambda one: -one[1]):
            process = loads.index(min(loads))
            loads[process] += weight
            kept += [thing] if process == jax.process_index() else []
        order = {id(thing): i for i, (thing, _) in enumerate(weighed)}
        return sorted(kept, key=lambda thing: order[id(thing)])

    def chunk(self, t: hf.Tensor) -> dict[str, int]:
        """Of a stored chunk in each of our letters."""
        shape = self.arrays.chunk(t.paths[0])
        return dict(zip(t.letters, shape[len(t.index) :], strict=True))

    def pieces(self, job: Job) -> list[dict[str, tuple[int, int]]]:
        room = self.piece_bytes // job.dtype.itemsize
        if len(job.outputs) > 1:  # scales and packed numbers need whole groups, which whole rows have
            room //= 4
        return list(pieces(job.tensor, self.chunk(job.tensor), room))

    def cost(self, job: Job, ranges: dict[str, tuple[int, int]]) -> int:
        """Bytes in memory while a piece is made: itself, and chunks as they lie in the file and read."""
        t = job.tensor
        box = t.theirs(ranges)[0]
        size = math.prod(b - a for a, b in box) * len(t.paths) * job.dtype.itemsize
        factor = 1 if len(job.outputs) == 1 else 4
        return factor * size + 2 * max(self.piece_bytes, self._chunk_bytes(t))

    def _chunk_bytes(self, t: hf.Tensor) -> int:
        return math.prod(self.arrays.chunk(t.paths[0])) * self.arrays.array(t.paths[0]).dtype.numpy_dtype.itemsize

    def check(self) -> None:
        """ValueError for arrays that are not there, and chunks that cannot be read slice by slice."""
        for job in self.jobs:
            t = job.tensor
            for path in t.paths:
                name, chunk = array_name(self.arrays.learner, path), self.arrays.chunk(path)
                if math.prod(chunk[: len(t.index)]) > 1 and self._chunk_bytes(t) > PIECE_BYTES:
                    raise ValueError(
                        f"{name} is stored in chunks of {list(chunk)}, {self._chunk_bytes(t) / 1e9:.1f} GB, each of "
                        "several layers or experts: save the run again with this version, which cuts them apart"
                    )
            self.budget.check(max(map(partial(self.cost, job), self.pieces(job))), job.tensor.name)

    def read(self, job: Job, ranges: dict[str, tuple[int, int]]) -> np.ndarray:
        """A piece, in their layout."""
        t = job.tensor
        box = t.theirs(ranges)[0]
        width = box[-1][1] - box[-1][0]
        out = np.empty([*(b - a for a, b in box[:-1]), width * len(t.paths)], job.dtype)
        chunk = self.chunk(t)
        for i, path in enumerate(t.paths):
            view = t.ours(out[..., i * width : (i + 1) * width])
            array = self.arrays.array(path)
            source = (array if array.dtype.numpy_dtype == job.dtype else ts.cast(array, ts.dtype(job.dtype)))[t.index]
            itemsize = array.dtype.numpy_dtype.itemsize
            for sub in _boxes(t, ranges, chunk, self.piece_bytes // itemsize):
                here = tuple(slice(a - ranges.get(c, (0, 0))[0], b - ranges.get(c, (0, 0))[0]) for c, (a, b) in sub)
                there = source[tuple(slice(a, b) for _, (a, b) in sub)][ts.d[:].translate_to[0]]
                ts.array(view[here], dtype=ts.dtype(job.dtype), copy=False, write=True).write(there).result()
        return out


def _boxes(
    t: hf.Tensor, ranges: dict[str, tuple[int, int]], chunk: dict[str, int], most: int
) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """A piece in boxes of whole chunks, of `most` elements if a chunk has not more."""
    spans = {c: ranges.get(c, (0, t.sizes[c])) for c in t.letters}
    step = {c: min(chunk[c], b - a) for c, (a, b) in spans.items()}
    for c in reversed(t.letters):
        a, b = spans[c]
        grow = min(-(-(b - a) // step[c]), max(1, most // math.prod(step.values())))
        step[c] *= grow
    steps = [[(c, (i, min(i + step[c], b))) for i in range(a, b, step[c])] for c, (a, b) in spans.items()]
    yield from map(list, itertools.product(*steps))


def _local(plan: _Plan, work: epath.Path, log: Callable[[str], object] | None) -> dict[str, str]:
    """This process's tensors into the shards laid out in a local folder; their digests go into its journal."""
    mine = plan.mine([(job, sum(o.nbytes for o in job.outputs)) for job in plan.jobs])
    files = {file: os.open(work / file, os.O_RDWR) for file in {plan.place[o.name][0] for j in mine for o in j.outputs}}
    journal = Journal(
        work / f"journal-{jax.process_index()}.jsonl", lambda _: [os.fdatasync(f) for f in files.values()]
    )  # pyright: ignore
    total = sum(o.nbytes for job in mine for o in job.outputs)
    progress = Progress("export", total, sum(sum(e["bytes"]) for e in journal.done.values()), log)

    def write(job: Job) -> None:
        before = journal.done.get(job.tensor.name, {"pieces": 0, "bytes": [0] * len(job.outputs)})
        if "sha256" in before:
            return
        written, hashes = list(before["bytes"]), [sha256() for _ in job.outputs]
        places = [(files[plan.place[o.name][0]], plan.place[o.name][1]) for o in job.outputs]
        for found, (fd, start), nbytes in zip(hashes, places, written, strict=True):
            _hash_again(found, fd, start, nbytes)
        todo = plan.pieces(job)
        for number, ranges in list(enumerate(todo, 1))[before["pieces"] :]:
            with plan.budget.hold(plan.cost(job, ranges)):
                size = 0
                parts = [*job.convert(plan.read(job, ranges)), *(job.constant if number == len(todo) else ())]
                for i, part in enumerate(parts):
                    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                    hashes[i].update(data)
                    pwrite(places[i][0], data, places[i][1] + written[i])
                    written[i] += len(data)
                    size += len(data)
                del parts, part, data
            progress.add(size)
            last = number == len(todo)
            digests = {o.name: h.hexdigest() for o, h in zip(job.outputs, hashes, strict=True)} if last else None
            entry = dict(pieces=number, bytes=list(written)) | (dict(sha256=digests) if digests else {})
            journal.add(job.tensor.name, size, **entry)

    try:
        run_all([partial(write, job) for job in mine], plan.threads)
        journal.flush()
    finally:
        for fd in files.values():
            os.close(fd)
        progress.close()
    return {}


def _hash_again(found: Any, fd: int, start: int, nbytes: int) -> None:
    """Take in what was written before."""
    while nbytes:
        data = os.pread(fd, min(nbytes, 2**24), start)
        found.update(data)
        start, nbytes = start + len(data), nbytes - len(data)


def _lay_out(file: epath.Path, outputs: Sequence[Output]) -> None:
    """A shard's header, and room for its tensors; one that is there already is left alone."""
    header = shard_header(outputs)
    size = len(header) + sum(o.nbytes for o in outputs)
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(fd).st_size != size:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            os.ftruncate(fd, size)
        os.pwrite(fd, header, 0)
    finally:
        os.close(fd)


def _remote(
    plan: _Plan, folder: epath.Path, identity: dict[str, Any], log: Callable[[str], object] | None
) -> dict[str, str]:
    """This process's shards onto an object store, each as one stream; a shard that is done is noted beside."""
    notes, text = folder / ".journal", json.dumps(identity, sort_keys=True)
    by_file: dict[str, list[Job]] = {file: [] for file in plan.shards}
    for job in plan.jobs:
        for file in {plan.place[o.name][0] for o in job.outputs}:
            by_file[file].append(job)
    mine = plan.mine([(file, sum(o.nbytes for o in some)) for file, some in plan.shards.items()])
    progress = Progress("export", sum(o.nbytes for file in mine for o in plan.shards[file]), 0, log)

    def write(file: str) -> None:
        note = notes / f"{file}.json"
        if note.exists() and json.loads(note.read_text())["plan"] == text:
            return
        digests: dict[str, str] = {}
        with (folder / file).open("wb") as f:
            f.write(shard_header(plan.shards[file]))
            for job in by_file[file]:
                wanted = [plan.place[o.name][0] == file for o in job.outputs]
                hashes, behind = [sha256() for _ in job.outputs], [[] for _ in job.outputs]
                direct = wanted.index(True)  # the others, which are small, wait
                for number, ranges in enumerate(todo := plan.pieces(job), 1):
                    with plan.budget.hold(plan.cost(job, ranges)):
                        parts = [*job.convert(plan.read(job, ranges)), *(job.constant if number == len(todo) else ())]
                        for i, part in enumerate(parts):
                            data = np.ascontiguousarray(part).tobytes() if wanted[i] else b""
                            hashes[i].update(data)
                            f.write(data) if i == direct else behind[i].append(data)
                            progress.add(len(data))
                for some in behind:
                    f.write(b"".join(some))
                digests |= {o.name: h.hexdigest() for o, h, w in zip(job.outputs, hashes, wanted, strict=True) if w}
        notes.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"plan": text, "sha256": digests}))

    run_all([partial(write, file) for file in mine], plan.threads)
    progress.close()
    sync_global_devices(f"export wrote the shards of {folder}")  # and noted their digests, which are read here
    return {k: v for file in plan.shards for k, v in json.loads((notes / f"{file}.json").read_text())["sha256"].items()}


def _manifest(
    arrays: Arrays, digests: dict[str, str], identity: dict[str, Any], dtype: str, quant: quantised.Scheme | None
) -> dict[str, Any]:
    source = dict(run=arrays.config.name, folder=os.fspath(arrays.folder), step=arrays.step, learner=arrays.learner,
                  manifest_sha256=identity["source"])  # fmt: skip
    return dict(format=1, source=source, dtype=dtype, quantisation=quant and quant.name, sha256=digests)


def shard_header(outputs: Sequence[Output]) -> bytes:
    return header_bytes((o.name, o.code, o.shape) for o in outputs)


def check_new(folder: epath.Path) -> None:
    taken = folder.exists() and (not folder.is_dir() or any(p.name != ".journal" for p in folder.iterdir()))
    if taken and not ("://" in os.fspath(folder) and not (folder / model_folder.CONFIG).exists()):
        raise ValueError(f"{folder} exists already and is not an empty folder: name a new one for the export")


def _check_bias_stored(arrays: Arrays) -> None:
    if arrays.model.router_bias:
        paths = [path for path in arrays.shapes if path[-1] == hf.ROUTER_BIAS]
        check_bias({path: np.asarray(arrays.array(path).read().result()) for path in paths}, arrays.model)


def check_bias(biases: dict[hf.Path, np.ndarray], cfg: ModelConfig) -> None:
    """ValueError if a weight that Hugging Face's model has not changes anything."""
    largest: dict[int, float] = {}
    for path, bias_LE in biases.items():
        i: Any = path[2]  # of the layer, within a block
        largest |= {block * cfg.period + i: float(b) for block, b in enumerate(np.abs(bias_LE).max(axis=1))}
    if nonzero := [layer for layer, b in largest.items() if b != 0]:
        worst = max(nonzero, key=lambda layer: largest[layer])
        raise ValueError(
            f"export: the router's bias is not 0 in {len(nonzero)} of {len(largest)} MoE layers, largest in layer "
            f"{worst} ({largest[worst]:.2g}), and Hugging Face's Llama 4 has none: train to the last step, after which "
            "it is 0, or export a later checkpoint"
        )
