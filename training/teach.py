"""Writes a teacher's soft targets over the rows that a run would train on and be evaluated on.

The teacher runs forward on the run's mesh; its hidden states become sparse targets inside the same program, so that
neither logits nor hidden states leave the devices. Each process writes its own rows. What the folder holds already is
passed over without a forward pass: after a kill the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from data.loader import Corpus
from llama4_jax.axes import BATCH_AXES, EXPERT, VOCAB_AXES, present
from llama4_jax.config import ModelConfig
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets, sparsify
from training.checkpoint import named_leaves, whole_place
from training.config import Learner, RunConfig
from training.loop import put_local
from training.mesh import BATCH_SPEC, check_fits, make_mesh, row_share
from training.start import check_init, given_params, stage_corpus
from training.state import execution, graphdef, run_model
from training.step import summed_in_parts
from training.target_record import Form
from training.targets import Identity, Pieces, Writer, names, pieces

SECONDS = 5  # between lines of progress
KEY = 0  # of all draws: with a token's content and place it decides them, whoever writes them

TeachFn = Callable[[nnx.State, Batch, Any], SparseTargets]


def find_teacher(cfg: RunConfig, name: str = "") -> str:
    """The learner named, or the only frozen one, or the only one; ValueError if it has no weights to begin with."""
    frozen = [n for n, learner in cfg.learners.items() if learner.optimizer is None]
    if name and name not in cfg.learners:
        raise ValueError(f"{cfg.name} has no learner {name!r}, only {', '.join(cfg.learners)}")
    candidates = [name] if name else frozen or list(cfg.learners)
    if len(candidates) > 1:
        what = "several frozen learners" if frozen else "no frozen teacher"
        raise ValueError(f"{cfg.name} has {what}: name one with --learner, of {', '.join(candidates)}")
    (name,) = candidates
    if not cfg.learners[name].init:
        raise ValueError(
            f"{cfg.name} has no teacher: {name} has no weights to begin with; give them with --learners.{name}.init"
        )
    return name


def teach(
    cfg: RunConfig, corpus: Corpus, out: epath.PathLike, form: Form, *, learner: str = "", batches: int | None = None,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """Write the targets of the run's first `batches` batches (default: of all its steps), and of its held-out ones.

    Returns folder, learner, teacher, batches (held-out ones too), those `passed` over as present, and the pieces,
    tokens and bytes that this process wrote. ValueError, FileNotFoundError: no teacher in `cfg`, its weights are
    missing or of another tokenizer, or `out` holds targets of another teacher, tokenizer or form.
    """
    name = find_teacher(cfg, learner)
    if cfg.fork:
        raise ValueError(f"{cfg.name} goes on after {cfg.fork}, and targets are written of runs from their first step")
    check_init(cfg, name, corpus.tokenizer.hash)
    say = log if jax.process_index() == 0 else lambda _: None
    steps = cfg.train.steps if batches is None else min(batches, cfg.train.steps)
    mesh = make_mesh(cfg.at(0).mesh)
    check_fits(cfg.at(0), mesh)
    params, step = given_params(cfg, name, mesh)
    identity = Identity(
        corpus.tokenizer.hash, cfg.learners[name].model.vocab_size, teacher_id(params, cfg.learners[name].model), step,
        form, cfg.learners[name].init,
    )  # fmt: skip
    with Writer(out, identity, jax.process_index()) as writer:
        multihost_utils.sync_global_devices("every process has looked before one of them writes")
        say(f"teacher: {name}, {identity.source} at step {step}, {identity.teacher}; {form}; into {out}")
        done, place, progress = 0, None, _Progress(steps, say)
        while done < steps:
            now, until = cfg.at(done), min(cfg.stage_end(done), steps)
            if (then := make_mesh(now.mesh)) != mesh:
                params, mesh = given_params(now, name, then)[0], then
            check_fits(now, mesh)
            here = stage_corpus(cfg, now, corpus, say)
            shape = (now.train.batch, now.train.seq_len, now.learners[name].model.chunk)
            share, teacher = row_share(mesh), make_teach_step(now.learners[name], mesh, form)
            held_out = _rows(here.heldout(*shape, now.train.eval_batches), share.part, share.parts)
            _write(held_out, teacher, params, mesh, writer, progress, trains=False)
            stream = here.train(*shape, cfg.train.seed, share.part, share.parts, place, crossing=bool(done))
            with closing(stream):
                _write(islice(stream, until - done), teacher, params, mesh, writer, progress)
                done, place = until, whole_place(stream.get_state())
    progress.line()
    return dict(folder=str(out), learner=name, teacher=identity.teacher, batches=progress.done, passed=progress.passed,
                **writer.written)  # fmt: skip


def teacher_id(params: nnx.State, model: ModelConfig) -> str:
    """16 hexadecimal digits of the weights and of what else of the model changes its output, the same on every mesh.

    Of each array the 32-bit words, each times an odd number of its place, summed modulo 2^32, so in any order.
    """

    @jax.jit
    def sums(leaves):
        def one(x, prime: int):
            place = sum((jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * jnp.uint32(pow(prime, d + 1, 2**32))
                         for d in range(x.ndim)), jnp.zeros(x.shape, jnp.uint32))  # fmt: skip
            words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
            return jnp.sum(words * (place * jnp.uint32(prime) * 2 + 1), dtype=jnp.uint32)

        return [[one(x, prime) for prime in (2654435761, 2246822519)] for x in leaves]

    named = {path: leaf.get_value() for path, leaf in named_leaves(params).items()}
    facts = {name: value for name, value in dataclasses.asdict(model).items() if name != "init_std"}
    parts = [sorted(facts.items()), list(named), np.asarray(jax.device_get(sums(list(named.values())))).tolist()]
    return blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def make_teach_step(learner: Learner, mesh: Mesh, form: Form) -> TeachFn:
    """The jitted (params, batch, names of the tokens) -> targets [B, T, K], [B, T], rows over the batch axes."""
    model, run = graphdef(learner), execution(learner, mesh)

    def local(params: nnx.State, batch: Batch, names_BT: Any) -> SparseTargets:
        def part(batch: Batch, names_BT: Any) -> tuple[Any, SparseTargets]:
            out = run_model(model, params, batch, run)
            targets = sparsify(
                out.hidden.reshape(-1, out.hidden.shape[-1]), out.unembedding, batch.labels.reshape(-1),
                names_BT.reshape(-1), jax.random.key(KEY), form.kind, form.top, form.draws,
                columns=present(VOCAB_AXES), rows=present(EXPERT),
            )  # fmt: skip
            return jnp.zeros(()), jax.tree.map(lambda x: x.reshape(*names_BT.shape, *x.shape[1:]), targets)

        return summed_in_parts(part, (batch, names_BT), learner.microbatches)[1]

    def step(params: nnx.State, batch: Batch, names_BT: Any) -> SparseTargets:
        specs = (run.specs(params), BATCH_SPEC, BATCH_SPEC)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH_SPEC, check_vma=False)
        return mapped(params, batch, names_BT)

    # Rows whole: a process writes pieces, whatever part of a row its devices hold.
    return jax.jit(step, out_shardings=NamedSharding(mesh, P(BATCH_AXES)))


def _rows(batches: list[Batch], part: int, parts: int) -> Iterator[Batch]:
    """This process's rows of batches that every process holds whole."""
    for batch in batches:
        rows = len(batch.tokens) // parts
        yield jax.tree.map(lambda x, first=part * rows, rows=rows: x[first : first + rows], batch)


def _write(
    batches: Iterable[Batch], teacher: TeachFn, params: nnx.State, mesh: Mesh, writer: Writer, progress: _Progress,
    trains: bool = True,
) -> None:  # fmt: skip
    """Targets of the batches of this process's rows; those of one are written while the next one is on the devices."""
    share = row_share(mesh)
    processes = range(jax.process_count())  # of those that hold the same rows, the first one writes them
    writes = jax.process_index() == next(p for p in processes if row_share(mesh, p).part == share.part)
    pending: tuple[Pieces, SparseTargets] | None = None
    for batch in chain(batches, [None]):
        begun = None
        if batch is not None:
            found = pieces(batch)
            wanted = _anywhere(writes and bool(writer.missing(found).any()))
            if wanted:
                of_tokens = names(found, batch.tokens.shape)
                begun = found, teacher(params, put_local(batch, mesh), put_local(of_tokens, mesh))
            progress.advance(wanted, trains)
        if pending is not None:
            found, targets = pending
            values = SparseTargets._make(_local_rows(x, mesh) for x in targets)
            if writes:
                writer.add(found, values)
            progress.tokens = writer.written["tokens"]
        pending = begun


def _anywhere(here: bool) -> bool:
    """Whether it holds on any process: they run the same programs."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def _local_rows(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """What `put_local` put there: this process's rows, in their order."""
    share = row_share(mesh)
    ways = int(np.prod([mesh.shape[name] for name in BATCH_AXES]))
    rows = x.shape[0] // ways
    out = np.empty((rows * len(share.places), *x.shape[1:]), x.dtype)
    for shard in x.addressable_shards:
        at = share.places.index((shard.index[0].start or 0) // rows) * rows
        out[at : at + rows] = shard.data
    return out


class _Progress:
    """Lines on how far the writing is."""

    def __init__(self, steps: int, say: Callable[[str], object]):
        self.steps, self.say = steps, say
        self.done = self.passed = self.tokens = self._trained = 0
        self._began = self._said = time.monotonic()

    def advance(self, wanted: bool, trains: bool) -> None:
        """One more batch, of training or held out, that was `wanted` or there already."""
        self.done, self.passed, self._trained = self.done + 1, self.passed + (not wanted), self._trained + trains
        if time.monotonic() - self._said >= SECONDS:
            self.line()

    def line(self) -> None:
        self._said = time.monotonic()
        spent = self._said - self._began
        left = timedelta(seconds=round(spent / self._trained * (self.steps - self._trained))) if self._trained else "?"
        self.say(
            f"targets: {self._trained:,} of {self.steps:,} batches, {self.passed:,} there already; {self.tokens:,} "
            f"tokens written, {self.tokens / max(spent, 1e-9):,.0f} a second; {left} left"
        )
