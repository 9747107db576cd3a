"""Folders in Hugging Face's format as weights: onto devices, or streamed into a checkpoint of weights alone.

Read are fused experts and those of quantised releases, one tensor for each expert, quantised weights
(`training/quantised.py`) among them. Headers are checked before anything is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from llama4_jax import hf
from llama4_jax.config import ModelConfig
from llama4_jax.text import abstract
from training.checkpoint import WEIGHTS_ALONE
from training.checkpoint_arrays import (
    array_name,
    chunk_sizes,
    create_array,
    pieces,
    weight_shapes,
    write_chunks,
    write_metadata,
)
from training.config import RunConfig
from training.manifest import files as all_files
from training.model_folder import CONFIG
from training.quantised import Dequantised, dequantised
from training.record import run_record
from training.safetensors_header import DTYPES, INDEX, Stored, read_json, stored_tensors
from training.transfer import Budget, Journal, Progress, check_space, fsync, read_journal, run_all, workplace

PIECE_BYTES = 2**24


@dataclass(frozen=True)
class Folder:
    """A folder that was checked: every tensor of its model is there with its shape and a dtype that can be read."""

    path: epath.Path
    cfg: ModelConfig
    table: list[hf.Tensor]
    stored: Mapping[str, Stored | Dequantised]


def open_folder(folder: epath.PathLike, vision: bool = True) -> Folder:
    """ValueError or FileNotFoundError names the first thing that is missing, left over, or not what it should be;
    without `vision` the tower of a whole model is passed over."""
    folder = epath.Path(folder)
    config = read_json(folder / CONFIG)
    whole = hf.is_whole_model(config)
    cfg = hf.config_from_hf(config, vision)
    stored = dequantised(stored_tensors(folder), config)
    apart = any(".feed_forward.experts.0." in name for name in stored)
    table = list(hf.tensors(cfg, hf.TEXT_PREFIX if whole else "", per_expert=apart))
    _check_stored(table, stored, hf.OTHER_PARTS if whole and not vision else ())
    return Folder(folder, cfg, table, stored)


def _check_stored(table: list[hf.Tensor], stored: Mapping[str, Stored | Dequantised], others: tuple[str, ...]) -> None:
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


# --- onto devices --------------------------------------------------------------------------------------------------


def load_hf(
    folder: epath.PathLike, *, shardings: Any = None, router_bias: bool = False, vision: bool = True
) -> nnx.State:
    """The weights of a Hugging Face folder in fp32, as the state of `abstract(read_config(folder, vision))`.

    `router_bias`: of that model with such a bias, at 0 as theirs has none.
    `shardings`: a tree of that structure with a `jax.sharding.Sharding` for each weight; by default everything goes
    onto the first device. Of one tensor at a time, what the local devices hold of it is in host memory, and no more is
    read (stretches that lie closer than `training.safetensors_header.GAP` are read with what is between them). Raises
    as `open_folder`.
    """
    opened = open_folder(folder, vision)
    cfg, stored = replace(opened.cfg, router_bias=router_bias), opened.stored
    state = nnx.split(abstract(cfg))[1]
    leaves, structure = jax.tree.flatten(state)
    places = [SingleDeviceSharding(jax.local_devices()[0])] * len(leaves)
    places = places if shardings is None else jax.tree.leaves(shardings)
    if len(places) != len(leaves):
        raise ValueError(f"load_hf: shardings for {len(places)} weights, the model has {len(leaves)}")
    place = {path: p.get_value() for path, p in nnx.to_flat_state(jax.tree.unflatten(structure, places))}
    shape = {path: p.get_value().shape for path, p in nnx.to_flat_state(state)}
    weights: dict[hf.Path, jax.Array] = {}
    for t in opened.table:
        for i, path in enumerate(t.paths):
            layer_place = _inner_sharding(place[path], len(t.index))
            layer = _put(t, i, stored[t.name], layer_place)
            if not t.index:
                weights[path] = layer
                continue
            empty, write = _stacker(shape[path], place[path])
            weights[path] = write(weights[path] if path in weights else empty(), layer, *map(jnp.int32, t.index))
    for path in (path for path in shape if path[-1] == hf.ROUTER_BIAS):
        weights[path] = _stacker(shape[path], place[path])[0]()
    return nnx.from_flat_state([(path, p.replace(weights[path])) for path, p in nnx.to_flat_state(state)])


def _inner_sharding(stacked: Sharding, leading: int) -> Sharding:
    """Where one layer, or one expert of it, of a stacked weight lies."""
    if isinstance(stacked, NamedSharding):
        return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[leading:]))
    return stacked


def local_box(t: hf.Tensor, sharding: Sharding) -> list[tuple[int, int]]:
    """The smallest box of ours that holds what this process's devices have: (first, last) in each dimension."""
    indices = sharding.addressable_devices_indices_map(t.our_shape).values()
    spans = [[s.indices(n)[:2] for s, n in zip(i, t.our_shape, strict=True)] for i in indices if i is not None]
    box = [(min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*spans, strict=True)]
    inner = {letter for group in t.groups for letter in group[1:]}  # they are read whole
    return [(0, n) if c in inner else ab for c, n, ab in zip(t.letters, t.our_shape, box, strict=True)]


def _put(t: hf.Tensor, number: int, stored: Stored | Dequantised, sharding: Sharding) -> jax.Array:
    """One of our weights that the tensor holds onto the devices, in fp32."""
    box = local_box(t, sharding)
    ours = t.ours(stored.box(t.theirs(dict(zip(t.letters, box, strict=True)))[number]))

    def part(index: Any) -> np.ndarray:
        spans = [s.indices(n)[:2] for s, n in zip(index, t.our_shape, strict=True)]
        here = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(spans, box, strict=True))
        return np.array(ours[here], np.float32)

    return jax.make_array_from_callback(t.our_shape, sharding, part, dtype=np.float32)


@cache
def _stacker(shape: tuple[int, ...], sharding: Sharding) -> tuple[Callable[[], jax.Array], Callable[..., jax.Array]]:
    """Make an empty stacked weight; write a layer, or one expert of it, into one, in place."""
    empty = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)

    def at(stacked, inner, *index):
        return stacked.at[index].set(inner)

    return empty, jax.jit(at, donate_argnums=0, out_shardings=sharding)


# --- into a checkpoint ---------------------------------------------------------------------------------------------


def import_run(
    folder: epath.PathLike,
    cfg: RunConfig,
    tokenizer_hash: str,
    finish: Callable[[epath.Path], object],
    *,
    max_memory: int,
    threads: int = 4,
    log: Callable[[str], object] | None = None,
) -> int:
    """Write a folder's weights as the checkpoint of step 0, of weights alone, of the run `cfg`, which has one learner
    with the folder's model; returns the bytes written.

    The weights keep their dtype (quantised ones become fp32, which is exact). `finish(work)` writes what else the run's
    folder holds. `max_memory` bounds the bytes of this process in memory. Every process of a job of several calls this
    and writes its share. What a kill leaves is gone on with by the same call. Only local folders are written. Raises as
    `open_folder`.
    """
    opened = open_folder(folder)
    run, (learner, of) = epath.Path(cfg.folder), next(iter(cfg.learners.items()))
    if "://" in os.fspath(run):
        raise ValueError(f"import writes local folders: name one in place of {run}, and copy it")
    if run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} exists already and is not an empty folder: name a new one for the run")
    budget = Budget(max_memory)
    jobs = _plan_jobs(opened, learner, budget, threads)
    total = sum(math.prod(t.shape) * DTYPES[opened.stored[t.name].dtype].itemsize for t in opened.table)
    work = run.with_name(f".{run.name}.partial")
    step = work / "checkpoints" / "0"
    record = run_record(cfg, tokenizer_hash)
    first = jax.process_index() == 0
    with ExitStack() as stack:
        if first:
            plan = dict(format=2, source=_identity(opened), record=record)
            stack.enter_context(workplace(work, plan))
            (step / "state").mkdir(parents=True, exist_ok=True)
            if not list((work).glob("journal-*")):
                check_space(run, total)
        sync_global_devices(f"import made {run}")
        arrays = _create_all(opened, learner, step / "state")
        journal = Journal(
            work / f"journal-{jax.process_index()}.jsonl",
            lambda some: fsync(step / name for e in some for name in e["sha256"]),
        )
        mine = [job for i, job in enumerate(jobs) if i % jax.process_count() == jax.process_index()]
        progress = Progress("import", sum(j.nbytes for j in mine), sum(e["size"] for e in journal.done.values()), log)
        run_all(
            [partial(_move, opened, learner, arrays, job, step, budget, journal, progress) for job in mine], threads
        )
        journal.flush()
        progress.close()
        sync_global_devices(f"import wrote {run}")
        if first:
            if of.model.router_bias:
                arrays |= _biases(of.model, learner, step / "state")
            counter = create_array(step / "state", "step", (), (), "<i4")
            counter.write(np.int32(0)).result()
            meta = {array_name(learner, p): (a.shape, a.chunk_layout.write_chunk.shape) for p, a in arrays.items()}
            for lock in (step / "state").glob("*/*.__lock"):  # of a process that was killed
                lock.unlink()
            finish(work)
            journals = list(work.glob("journal-*"))
            digests = {k: v for one in journals for e in read_journal(one).values() for k, v in e["sha256"].items()}
            write_metadata(step, meta | {"step": ((), ())}, digests, data=WEIGHTS_ALONE, run=record)
            chunks = {f"checkpoints/0/{name}" for name in digests}
            fsync(file for name, file in all_files(work).items() if name not in chunks)
            for leftover in [*journals, work / "plan.json"]:
                leftover.unlink()
            if run.exists():
                run.rmdir()
            work.rename(run)
            fsync([run])
        sync_global_devices(f"import named {run}")
    return total


@dataclass(frozen=True)
class _Job:
    """A piece of a tensor: chunks that nobody else writes."""

    name: str
    tensor: hf.Tensor
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int
    memory: int


def _plan_jobs(opened: Folder, learner: str, budget: Budget, threads: int) -> list[_Job]:
    jobs = []
    room = min(PIECE_BYTES, budget.total // threads // 4)
    for t in opened.table:
        itemsize = DTYPES[opened.stored[t.name].dtype].itemsize
        chunk = chunk_sizes(t, itemsize)
        for ranges in pieces(t, chunk, room // itemsize):
            size = math.prod(b - a for a, b in t.theirs(ranges)[0]) * len(t.paths) * itemsize
            # As read, and a chunk as it goes to its file; quantised ones also as codes and as scales for each of them.
            memory = 4 * size if isinstance(opened.stored[t.name], Dequantised) else size
            memory += 2 * math.prod(chunk.values()) * itemsize
            budget.check(memory, t.name)
            jobs.append(_Job(f"{t.name} {json.dumps(ranges)}", t, ranges, size, memory))
    return jobs


def _move(
    opened: Folder,
    learner: str,
    arrays: Mapping[hf.Path, Any],
    job: _Job,
    step: epath.Path,
    budget: Budget,
    journal: Journal,
    progress: Progress,
) -> None:
    if job.name in journal.done:
        return
    t, digests = job.tensor, {}
    with budget.hold(job.memory):
        for path, part in zip(t.paths, _read(opened, job), strict=True):
            name, chunk = f"state/{array_name(learner, path)}", arrays[path].chunk_layout.write_chunk.shape
            first = (*t.index, *(job.ranges.get(c, (0, 0))[0] for c in t.letters))
            ours = np.expand_dims(t.ours(part), tuple(range(len(t.index))))
            digests |= {f"{name}/{key}": d for key, d in write_chunks(step / name, chunk, first, ours).items()}
    journal.add(job.name, job.nbytes, size=job.nbytes, sha256=digests)
    progress.add(job.nbytes)


def _read(opened: Folder, job: _Job) -> list[np.ndarray]:
    """A piece, in their layout: a part for each of our weights that lie in it side by side."""
    t, stored = job.tensor, opened.stored[job.tensor.name]
    boxes = t.theirs(job.ranges)
    if len(boxes) == 1:
        return [stored.box(boxes[0])]
    assert isinstance(stored, Stored), f"{t.name} is fused and quantised"  # such releases have them apart
    return stored.split([*boxes[0][:-1], (boxes[0][-1][0], boxes[-1][-1][1])], len(boxes))


def _dtypes(opened: Folder) -> dict[hf.Path, hf.Tensor]:
    """A tensor for each of our weights; ValueError where a weight's layers come in several dtypes."""
    found: dict[hf.Path, hf.Tensor] = {}
    for t in opened.table:
        for path in t.paths:
            one = found.setdefault(path, t)
            a, b = opened.stored[one.name].dtype, opened.stored[t.name].dtype
            if a != b:
                raise ValueError(f"tensor {t.name} is {b}, but {one.name}, of the same kind, is {a}")
    return found


def _create_all(opened: Folder, learner: str, state: epath.Path) -> dict[hf.Path, Any]:
    """Our arrays, empty or as they were left."""
    shapes, made = weight_shapes(opened.cfg), {}
    for path, t in _dtypes(opened).items():
        dtype = DTYPES[opened.stored[t.name].dtype]
        inner = chunk_sizes(t, dtype.itemsize)
        chunks = (*(1 for _ in t.index), *(inner[c] for c in t.letters))
        made[path] = create_array(state, array_name(learner, path), shapes[path], chunks, dtype.name)
    return made


def _biases(model: ModelConfig, learner: str, state: epath.Path) -> dict[hf.Path, Any]:
    made = {}
    for path, shape in weight_shapes(model).items():
        if path[-1] == hf.ROUTER_BIAS:
            made[path] = create_array(state, array_name(learner, path), shape, shape, "float32")
            made[path].write(np.zeros(shape, np.float32)).result()
    return made


def _identity(opened: Folder) -> str:
    """A hash of the folder's configuration and index, and of its shards' names, sizes and times of writing."""
    found = sha256()
    for file in (opened.path / CONFIG, opened.path / INDEX):
        found.update(file.read_bytes() if file.exists() else b"")
    for file in sorted({os.fspath(s.file) for s in opened.stored.values()}):
        stat = epath.Path(file).stat()
        found.update(json.dumps([os.path.basename(file), stat.length, str(stat.mtime)]).encode())
    return found.hexdigest()
