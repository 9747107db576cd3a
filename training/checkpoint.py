"""Checkpoints of a run, written by Orbax in the background and restored onto any mesh.

`FOLDER/checkpoints/STEP` holds three items: `state` (weights, optimizer, step), `data` (the position in the data,
JSON) and `run` (the resolved config and the tokenizer's hash, JSON). Arrays are stored flat, by a name such as
`learners.scout.params.blocks.layers.0.attention.wq_DNH`, so that a checkpoint can be read without this project's
classes; each in chunks of one block (and one expert), so that a reader of a single layer or expert, on whatever
mesh, reads that alone. Orbax restores a wrong dtype by casting in silence, and damaged files without a word: shapes,
dtypes and the files' digests are compared here. `manifest.json`, written last, makes a checkpoint of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data.loader import merged
from llama4_jax.axes import is_variable
from llama4_jax.text import abstract
from training import manifest
from training.config import RunConfig
from training.goodput import spent
from training.mesh import check_divides, shardings
from training.record import config_from_json
from training.state import TrainState, execution

CHUNK_BYTES = 2**26
"""What a stored chunk may have at most, so that whoever reads a slice needs little memory."""
WEIGHTS_ALONE = {}
"""The position in the data of a checkpoint that an import wrote: weights, in any dtype that goes into fp32 exactly, and
nothing else of the state."""
FLOATS = ("bfloat16", "float16")


class Damaged(ValueError):
    """A checkpoint whose files are not what was written."""


class NotDeleted(OSError):
    """An old checkpoint that should make room."""


class Checkpoints:
    """The checkpoints of a run's folder. Closing waits for the last save; a failed save raises there or at the next.

    A checkpoint counts once its manifest is there (`training/manifest.py`), which is made in the background after all
    else is written. Whatever reads one compares every file with it first; `newest_good` falls back to one before.
    """

    def __init__(self, folder: str | epath.Path, keep: int | None = None, keep_every: int = 0,
                 may_write: Callable[[], object] = lambda: None):  # fmt: skip
        """`keep`: how many of the newest to keep; None opens the folder for reading only. Of older ones those of steps
        that are multiples of `keep_every` stay, too. `may_write` raises where another process writes here by now."""
        self._may_write = may_write
        self.folder, self._keep, self._keep_every = epath.Path(folder) / "checkpoints", keep, keep_every
        if keep is None and not self.folder.exists():
            raise FileNotFoundError(f"no checkpoints in {folder}: {self.folder} does not exist")
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        # A store has no renames: there Orbax's mark of what is whole is a file, too.
        mode = ocp.options.AtomicityMode
        atomicity = ocp.options.AtomicityOptions(mode=mode.COMMIT_FILE if _in_store(self.folder) else mode.AUTO)
        items = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), data=ocp.JsonCheckpointHandler(), run=ocp.JsonCheckpointHandler(),
            composite_options=ocp.CompositeOptions(atomicity_options=atomicity),
        )  # fmt: skip
        self._orbax = ocp.AsyncCheckpointer(items, atomicity_options=atomicity)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._sealing: Future[None] | None = None
        self._saving = 0
        self._verified: set[int] = set()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save under way and release what is held; OSError if that save failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    # --- Which there are

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order; whether they are good is not looked at."""
        return manifest.finished(self.folder)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps, default=None)

    def find(self, step: int | None = None) -> int:
        """That step, or the newest, if there is a checkpoint of it; else FileNotFoundError."""
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            wanted = "complete checkpoint" if step is None else f"checkpoint of step {step}"
            near = f"; the nearest is {min(steps, key=lambda s: abs(s - step))}" if steps and step is not None else ""
            raise FileNotFoundError(f"no {wanted} in {self.folder}; there are: {steps}{near}")
        return max(steps) if step is None else step

    def problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint's files, a line each; with several processes all of them must ask."""
        found = manifest.problems(self.path(step), jax.process_index(), jax.process_count())
        if jax.process_count() > 1:
            worst = multihost_utils.process_allgather(np.array(len(found), np.int32))
            found = found or ([f"process {int(worst.argmax())} found it damaged"] if worst.any() else [])
        if not found:
            self._verified.add(step)
        return found

    def check_good(self, step: int) -> None:
        """`Damaged`, naming the file, if the checkpoint is not what was written; looked at once."""
        if step not in self._verified and (found := self.problems(step)):
            raise self._damaged(step, found)

    def newest_good(self, say: Callable[[str], object]) -> int | None:
        """Step of the newest checkpoint that is what was written. Damaged ones before it are set aside, and what a
        save that was broken off left behind is removed; `say` takes a line for each."""
        first = jax.process_index() == 0
        for left in self._leftovers() if first else ():
            left.rmtree() if left.is_dir() else left.unlink()
        multihost_utils.sync_global_devices("what broken-off saves left is gone")
        unfinished = {int(f.name) for f in self.folder.iterdir() if f.name.isdecimal()} - set(self.steps)
        for step in sorted(unfinished, reverse=True):
            self.set_aside(step, f"{manifest.FILE} is missing: the save was broken off, or the file deleted", say)
        for step in reversed(self.steps):
            if not (found := self.problems(step)):
                return step
            self.set_aside(step, "; ".join(found[:3]), say)
        return None

    def set_aside(self, step: int, why: str, say: Callable[[str], object]) -> None:
        """Move a checkpoint to `checkpoints/set-aside`, where nothing looks for it; every process must call this."""
        places = (self.folder / "set-aside" / f"{step}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 10**6))))
        to = next(place for place in places if not place.exists())
        multihost_utils.sync_global_devices(f"step {step} is set aside")
        if jax.process_index() == 0:
            manifest.move(self.path(step), to)
            (to.parent / f"{to.name}.txt").write_text(why + "\n")
        multihost_utils.sync_global_devices(f"step {step} was set aside")
        self._verified.discard(step)
        say(f"checkpoint {self.path(step)} is not used: {why}; moved to {to}")

    def path(self, step: int) -> epath.Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def digest(self, step: int) -> str:
        """Names the whole of a checkpoint."""
        return manifest.name_of(self.path(step))

    # --- Writing

    @spent("save")
    def save(self, step: int, state: TrainState, position: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Start to write a checkpoint; returns once the arrays are copied off the devices. OSError if one failed."""
        self.wait()
        self._may_write()
        self._saving = step
        named = named_leaves(state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(
                {name: _value(leaf) for name, leaf in named.items()},
                save_args={
                    name: ocp.SaveArgs(shard_axes=chunked_axes(leaf), chunk_byte_size=CHUNK_BYTES)
                    for name, leaf in named.items()
                },
            ),
            data=ocp.args.JsonSave(json.loads(json.dumps(position))),  # written later, when the run has gone on with it
            run=ocp.args.JsonSave(json.loads(json.dumps(record))),
        )
        try:
            self._orbax.save(_absolute(self.path(step)), args=items, force=True)
        except Exception as error:
            raise self._failure(error) from error
        self._verified.discard(step)
        self._sealing = self._background.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        """Once Orbax is done, the manifest; then checkpoints that are not kept go, the manifest before the rest."""
        self._orbax.wait_until_finished()
        self._may_write()
        manifest.write(self.path(step), jax.process_index(), jax.process_count())
        if jax.process_index() > 0 or self._keep is None:
            return
        for old in self.steps[: -self._keep]:
            if not (self._keep_every and old % self._keep_every == 0):
                self._delete(old, step)

    def _delete(self, old: int, new: int) -> None:
        # A store may do it and lose the answer: then there is nothing left to do.
        try:
            manifest.persist(partial((self.path(old) / manifest.FILE).unlink, missing_ok=True))
            manifest.persist(partial(self.path(old).rmtree, missing_ok=True))
        except OSError as error:
            raise NotDeleted(
                f"the checkpoint of step {new} was written, but {self.path(old)}, which is to make room for it, could "
                f"not be deleted: {error.strerror or error}"
            ) from error

    def check(self) -> None:
        """OSError if a save has failed in the background, or another process writes here; returns at once."""
        self._may_write()
        if self._sealing and self._sealing.done():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is done, its manifest included; OSError if it failed."""
        sealing, self._sealing = self._sealing, None
        try:
            if sealing:
                sealing.result()
        except (NotDeleted, BlockingIOError):
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OSError:
        what = str(error).strip().splitlines() or [type(error).__name__]
        return OSError(f"the checkpoint of step {self._saving} in {self.folder} was not written: {what[0]}")

    def _leftovers(self) -> list[epath.Path]:
        """What broken-off saves left: Orbax's temporary folders, and in a store folders without its mark."""
        found = [f for f in self.folder.iterdir() if "orbax-checkpoint-tmp" in f.name]
        if _in_store(self.folder):
            numbered = [f for f in self.folder.iterdir() if f.name.isdecimal()]
            marks = ("commit_success.txt", manifest.FILE)
            found += [f for f in numbered if not any((f / mark).exists() for mark in marks)]
        return found

    def _damaged(self, step: int, found: list[str]) -> Damaged:
        others = [s for s in self.steps if s != step]
        rest = f"other checkpoints: {', '.join(map(str, others))}" if others else "there is no other"
        return Damaged(f"checkpoint {self.path(step)} is damaged: {found[0]}; {rest}")

    # --- Reading

    def record(self, step: int) -> dict[str, Any]:
        """What `training.record.run_record` returned when the checkpoint was written."""
        return self._json(step, "run")

    def config(self, step: int) -> RunConfig:
        """That with which the checkpoint was written."""
        return config_from_json(self.record(step)["config"])

    def place(self, step: int) -> dict[str, Any]:
        """The position in the data, of the lanes of all processes (`data.loader.merged`), and the tokens seen."""
        return self._json(step, "data")

    @spent("restore")
    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state, placed as `like` (see `training.state.abstract_state`), and the position in the data."""
        return self.restore_tree(step, like), self.place(step)

    def restore_tree(self, step: int, like: Any, prefix: str = "") -> Any:
        """The part of the state whose names begin with `prefix`, as the abstract tree `like` is shaped and placed."""
        named = named_leaves(like, prefix)
        wanted = {name: _value(leaf) for name, leaf in named.items()}
        stored = {name: of for name, of in self.shapes(step).items() if name.startswith(prefix)}
        alone = self.place(step) == WEIGHTS_ALONE
        # Optimizers and running means begin at zero (tests/training/test_import_run.py).
        fresh = {n: x for n, x in wanted.items() if n not in stored and alone and ".params." not in n}
        there = {n: x for n, x in wanted.items() if n not in fresh}
        _check_leaves(there, stored, f"{self.folder}/{step}", alone)
        arrays = self.arrays(step, there)
        arrays |= {name: jnp.zeros(x.shape, x.dtype, device=x.sharding) for name, x in fresh.items()}
        leaves = [
            leaf.replace(arrays[name]) if is_variable(leaf) else arrays[name] for name, leaf in named.items()
        ]  # fmt: skip
        return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_variable), leaves)

    def restore_some(self, step: int, like: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays of these names, as the abstract ones are shaped and placed, of whatever else there is beside."""
        stored = {name: of for name, of in self.shapes(step).items() if name in like}
        _check_leaves(like, stored, f"{self.folder}/{step}", self.place(step) == WEIGHTS_ALONE)
        return self.arrays(step, like)

    def shapes(self, step: int) -> dict[str, Any]:
        """What the checkpoint holds, by name: objects with `shape` and `dtype`."""
        self.check_good(self.find(step))
        stored: Any = self._orbax.metadata(_absolute(self.path(step))).item_metadata
        return dict(stored["state"].tree)

    def arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Some of the arrays, as `wanted` places them; shapes and dtypes are taken at its word."""
        self.check_good(self.find(step))
        args = {
            name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for name, x in wanted.items()
        }
        restore = ocp.args.PyTreeRestore(dict(wanted), restore_args=args, partial_restore=True)
        return self._orbax.restore(_absolute(self.path(step)), args=ocp.args.Composite(state=restore))["state"]

    def _json(self, step: int, item: str) -> dict[str, Any]:
        """Of the terabytes beside it nothing is read."""
        if self.find(step) not in self._verified and (found := manifest.problems(self.path(step), within=item)):
            raise self._damaged(step, found)
        args: Any = {item: ocp.args.JsonRestore()}
        return self._orbax.restore(_absolute(self.path(step)), args=ocp.args.Composite(**args))[item]


def _in_store(folder: epath.Path) -> bool:
    return "://" in str(folder)


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if _in_store(folder) else epath.Path(folder).resolve()


# --- Names, chunks, shapes


def named_leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, in the tree's order; an `nnx.Param` is one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return {prefix + jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def chunked_axes(leaf: Any) -> tuple[int, ...]:
    """Dimensions of which a stored chunk has one place: the stacked blocks, and the experts."""
    if not is_variable(leaf):
        return ()
    stacked = leaf.get_value().ndim - len(leaf.axes)
    return (*range(stacked), *(stacked + i for i, name in enumerate(leaf.axes) if name == "experts"))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if is_variable(leaf) else leaf


def _check_leaves(wanted: Mapping[str, Any], stored: Mapping[str, Any], where: str, any_float: bool = False) -> None:
    if missing := sorted(set(wanted) - set(stored)):
        raise ValueError(f"checkpoint {where} lacks {missing[0]} ({len(missing)} of {len(wanted)} arrays missing)")
    if extra := sorted(set(stored) - set(wanted)):
        raise ValueError(f"checkpoint {where} holds {extra[0]}, which this run has not ({len(extra)} such arrays)")
    for name, x in wanted.items():
        have = stored[name]
        exact = have.dtype == x.dtype or (any_float and x.dtype == np.float32 and str(have.dtype) in FLOATS)
        if tuple(have.shape) != x.shape or not exact:
            raise ValueError(
                f"checkpoint {where}: {name} is {have.dtype}{list(have.shape)}, this run needs {x.dtype}{list(x.shape)}"
            )


# --- The run's place and configuration


def whole_place(place: Mapping[str, Any]) -> dict[str, Any]:
    """The place in the data of all processes together, from that of each: every one of them must call this."""
    if jax.process_count() == 1:
        return dict(place)
    text = np.frombuffer(json.dumps(place).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return merged([json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)])


def load_config(folder: str | epath.Path, step: int | None = None) -> RunConfig:
    """The config with which a run's checkpoint, the newest by default, was written."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.config(checkpoints.find(step))


# --- Weights alone, for inference, evaluation and export


class Weights(NamedTuple):
    """One learner's weights out of a run's checkpoint."""

    config: RunConfig
    learner: str
    step: int
    params: nnx.State  # fp32


def restore_params(
    folder: str | epath.Path, learner: str | None = None, step: int | None = None, mesh: Mesh | None = None
) -> Weights:
    """Weights of one learner (needed when there are several), newest checkpoint by default, without its optimizer.

    They lie as in training on `mesh`, or all on the first device. ValueError or FileNotFoundError say what is missing.
    """
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.find(step)
        cfg = checkpoints.config(step)
        name = which_learner(cfg, learner, folder)
        like = abstract_params(cfg, name, mesh)
        return Weights(cfg, name, step, checkpoints.restore_tree(step, like, f"learners.{name}.params."))


def which_learner(cfg: RunConfig, learner: str | None, where: epath.PathLike) -> str:
    """The learner of that name, or the only one; ValueError names those that the run in `where` has."""
    if learner is None and len(cfg.learners) > 1:
        raise ValueError(f"{where} has several learners, name one of {', '.join(cfg.learners)}")
    name = learner or next(iter(cfg.learners))
    if name not in cfg.learners:
        raise ValueError(f"{where} has no learner {name!r}, only {', '.join(cfg.learners)}")
    return name


def abstract_params(cfg: RunConfig, learner: str, mesh: Mesh | None = None) -> nnx.State:
    """Shapes, dtypes and shardings of a learner's weights on `mesh`, or on this process's first device."""
    params = nnx.split(abstract(cfg.learners[learner].model))[1]
    if mesh is None:
        placed: Any = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), params)
    else:
        check_divides(learner, cfg.learners[learner].model, mesh)
        placed = shardings(mesh, execution(cfg.learners[learner], mesh).specs(params))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
