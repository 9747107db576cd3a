"""A run from its first step to its last: where it lies, what it starts from, the steps, what is kept of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from data.batch import Batch
from data.loader import Corpus
from training import fork
from training.checkpoint import (
    Checkpoints,
    check_resumable,
    run_record,
    whole_place,
)
from training.config import RunConfig
from training.evaluate import evaluate, make_eval_step
from training.first_batches import FirstBatches
from training.flops import active_matmul_parameters
from training.mesh import BATCH_SPEC, check_fits, make_mesh, row_share
from training.metrics import Console, Throughput, Writers, prefix, read, scalars
from training.start import CONFIG, check_init, initial_state, open_targets
from training.state import TrainState, abstract_state
from training.step import make_train_step
from training.target_sources import read_ahead
from training.weighting import DOMAINS


def train(cfg: RunConfig, corpus: Corpus, log: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Train until `cfg.train.steps`, going on from the newest checkpoint in `cfg.folder`; returns the closing summary.

    The summary: folder, step, steps, complete, signal (that of SIGTERM or SIGINT which stopped the run after a last
    checkpoint, else None) and metrics (the last record). Losses are bit-identical whether or not a run was
    interrupted, on the same mesh. `log` takes the lines that otherwise go to the terminal.
    """
    # --- The folder: how far the run got, and whether this is the same run
    _check_vocabulary(cfg, corpus)
    _use_compilation_cache()
    if jax.process_index() > 0:
        log = log or (lambda _: None)  # the first process speaks for all
    folder = epath.Path(cfg.folder)
    record = run_record(cfg, corpus.tokenizer.hash)
    newest, changes = _find_start(folder, record)
    if newest is None:
        changes = _check_sources(cfg, corpus)
    start, steps = _fork_step(cfg) if newest is None else newest, cfg.train.steps
    if start >= steps:
        return _say(log, _summary(cfg, folder, start, None), f"{folder} is complete already: {start} steps of {steps}")

    with ExitStack() as stack:
        # --- The first stage: its mesh, the state on it, its data and compiled functions
        console = stack.enter_context(closing(Console(cfg, start, log)))
        corpora = _look_ahead(cfg, corpus, start, console.line)
        with _source(folder, newest, cfg) as source:
            stage = _Stage(cfg, corpora[start], start, source, console.line)
        for line in _describe(stage, folder, newest, changes):
            console.line(line)

        # --- What is kept
        writers = None
        if jax.process_index() == 0:
            write_config(folder, cfg)
            corpus.tokenizer.save(folder)
            writers = stack.enter_context(closing(Writers(folder, start)))
            if newest is None:
                stage.stream = FirstBatches(stage.stream, corpora[start], folder, start)
        checkpoints = stack.enter_context(Checkpoints(folder, cfg.train.checkpoint_keep))
        stop = stack.enter_context(_Stop())

        # --- The steps of a stage, and of the next, which begins from the checkpoint that they end with
        step = _steps(stage, _Reporter(stage, console, writers), checkpoints, stop, record)
        while step < steps and stop.signal is None:
            checkpoints.wait()
            multihost_utils.sync_global_devices("the checkpoint that the next stage begins from is written")
            stage = _Stage(cfg, corpora[step], step, checkpoints, console.line)
            console.line(f"after step {step}: {_where(stage)}")
            step = _steps(stage, _Reporter(stage, console, writers), checkpoints, stop, record)
    # Leaving the block has waited for the last checkpoint, and raised if it was not written.
    summary = _summary(cfg, folder, step, stop.signal)
    return _say(log, summary, _farewell(summary))


class _Stage:
    """Where the steps from `start` to `stop` are made: the mesh, the state on it, its data, its compiled functions."""

    def __init__(
        self, cfg: RunConfig, corpus: Corpus, start: int, source: Checkpoints | None, say: Callable[[str], object]
    ):
        """`source` holds the checkpoint of step `start`, None where the run begins with a state of its own."""
        self.start, self.stop = start, cfg.stage_end(start)
        self.cfg, self.domains = cfg.at(start), corpus.domains
        _check_schedules(self.cfg, start)
        self.mesh = make_mesh(self.cfg.mesh)
        check_fits(self.cfg, self.mesh)
        place = None
        if source:
            self.state, place = source.restore(start, abstract_state(self.cfg, self.mesh))
        else:
            self.state = initial_state(self.cfg, self.mesh)
        self.tokens_seen: int = place["tokens_seen"] if place else 0
        self.domain_tokens: dict[str, int] = dict(place.get("domain_tokens", {})) if place else {}
        self.pass_tokens = corpus.pass_tokens
        chunk = next(iter(cfg.learners.values())).model.chunk
        shape = (self.cfg.train.batch, self.cfg.train.seq_len, chunk)
        # A stage, or a fork, may read other rows than what was before it.
        crossing = start in [stage.after for stage in cfg.stages] or (bool(cfg.fork) and start == _fork_step(cfg))
        stream = corpus.train(*shape, self.cfg.train.seed, *row_share(self.mesh)[:2], place, crossing)
        self.targets = open_targets(self.cfg, corpus.tokenizer.hash, say)
        self.stream = read_ahead(stream, self.targets.values(), self.stop - start)
        held_out = corpus.heldout(*shape, self.cfg.train.eval_batches)
        self.held_out = _HeldOut(self.cfg, self.mesh, self.domains, held_out)
        self.train_step = make_train_step(self.cfg, self.mesh, len(self.domains))

    def close(self) -> None:
        """Give up the devices' memory and stop reading."""
        self.stream.close()
        for source in self.targets.values():
            source.close()
        del self.state, self.train_step, self.held_out


def _steps(stage: _Stage, report: _Reporter, checkpoints: Checkpoints, stop: _Stop, record: dict[str, Any]) -> int:
    """The steps of a stage; returns the last one, at which there is a checkpoint.

    The metrics of one are fetched while the next one runs.
    """
    step, train = stage.start, stage.cfg.train
    with closing(stage):
        for step in range(stage.start + 1, stage.stop + 1):
            asked = time.perf_counter()
            rows = next(stage.stream)
            targets = {source: put_local(of.look_up(rows), stage.mesh) for source, of in stage.targets.items()}
            batch = put_local(rows, stage.mesh)
            wait = time.perf_counter() - asked
            stage.state, metrics = stage.train_step(stage.state, batch, targets)
            report.finish()
            report.begin(step, metrics, wait)
            checkpoints.check()
            stopping, last = stop.requested(step), step == stage.stop
            evaluating = last or (step % train.eval_every == 0 and not stopping)
            if evaluating or stopping or step % train.checkpoint_every == 0:
                report.finish(partial(stage.held_out, stage.state) if evaluating else dict)
                if last or stopping or step % train.checkpoint_every == 0:
                    seen = {"tokens_seen": report.tokens_seen, "domain_tokens": report.domain_tokens}
                    place = whole_place(stage.stream.get_state()) | seen
                    checkpoints.save(step, stage.state, place, record)
                report.restart()
            if stopping:
                break
    return step


# --- Before the first step


def write_config(folder: epath.Path, cfg: RunConfig) -> None:
    """The resolved config, `dataclasses.asdict` as JSON, into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")


def _check_vocabulary(cfg: RunConfig, corpus: Corpus) -> None:
    for name, learner in cfg.learners.items():
        if learner.model.vocab_size < corpus.tokenizer.vocab_size:
            raise ValueError(
                f"{name}'s model.vocab_size is {learner.model.vocab_size}, but the tokenizer has "
                f"{corpus.tokenizer.vocab_size} tokens"
            )


def _check_domains(cfg: RunConfig, corpus: Corpus) -> None:
    if len(corpus.domains) > DOMAINS and any(learner.distillation.teacher for learner in cfg.learners.values()):
        raise ValueError(f"a student's means have room for {DOMAINS} domains, but there are {len(corpus.domains)}")


def _fork_step(cfg: RunConfig) -> int:
    """Steps before the first one of a new run."""
    return fork.parts(cfg.fork)[1] if cfg.fork else 0


def _check_sources(cfg: RunConfig, corpus: Corpus) -> list[str]:
    """What a new run begins from is there, and means by a token id what this run means by it; lines of how it differs.

    A folder without a tokenizer that is ours to read (a checkpoint from elsewhere) is taken at its word.
    """
    if cfg.fork:
        run, step = fork.parts(cfg.fork)
        if step >= cfg.train.steps:
            raise ValueError(f"{cfg.fork} is at or behind the end, train.steps = {cfg.train.steps}: give more steps")
        with Checkpoints(run) as checkpoints:
            return fork.differences(cfg, checkpoints.record(step), corpus.tokenizer.hash)
    for name in cfg.learners:
        check_init(cfg, name, corpus.tokenizer.hash)
    return []


def _check_schedules(cfg: RunConfig, start: int) -> None:
    for name, learner in cfg.learners.items():
        if learner.optimizer and learner.optimizer.start > start:
            raise ValueError(f"{name}'s optimizer.start is {learner.optimizer.start}, but the run begins at {start}")


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, unless JAX_COMPILATION_CACHE_DIR names another place for them."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "llama4_jax", "xla"))


def _find_start(folder: epath.Path, record: dict[str, Any]) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint, and what changed in the config since; ValueError if that makes it another run."""
    newest, changes = None, []
    if (folder / "checkpoints").exists():
        with Checkpoints(folder) as checkpoints:
            newest = checkpoints.latest
            if newest is not None:
                changes = check_resumable(checkpoints.record(newest), record, str(folder), newest)
    multihost_utils.sync_global_devices("every process has looked before one of them writes")
    return newest, changes


def _source(folder: epath.Path, newest: int | None, cfg: RunConfig) -> AbstractContextManager[Checkpoints | None]:
    """The checkpoints that the run goes on from, its own or the ones it is a fork of; None for its beginning."""
    if newest is not None:
        return Checkpoints(folder)
    return Checkpoints(fork.parts(cfg.fork)[0]) if cfg.fork else nullcontext()


def _look_ahead(cfg: RunConfig, corpus: Corpus, start: int, say: Callable[[str], object]) -> dict[int, Corpus]:
    """What each stage from `start` on reads, by the steps before it; ValueError now for what would fail then.

    A stage for another number of devices than are here may be run elsewhere, so that it is only spoken of.
    """
    corpora, devices, done = {}, jax.device_count(), start
    while done < cfg.train.steps:
        then = cfg.at(done)
        try:
            corpora[done] = corpus if then.data == cfg.data else corpus.of(then.data, say)
            _check_domains(then, corpora[done])
            corpora[done].check_heldout(then.train.batch, then.train.eval_batches)
            if done == start or then.mesh.suits(devices):
                check_fits(then, make_mesh(then.mesh))
            else:
                say(f"after step {done} comes a mesh of other than the {devices} devices here: there this run ends, to "
                    "go on by the same command where they are")  # fmt: skip
        except ValueError as error:
            raise error if done == start else ValueError(f"after step {done}: {error}") from error
        done = cfg.stage_end(done)
    return corpora


def _describe(stage: _Stage, folder: epath.Path, newest: int | None, changes: list[str]) -> Iterator[str]:
    for name, learner in stage.cfg.learners.items():
        total = sum(x.size for x in jax.tree.leaves(stage.state.learners[name].params))
        active = active_matmul_parameters(learner.model)
        yield f"{name}: {total:,} parameters, {active:,} of them multiplied with each token"
    yield _where(stage)
    new = f"a new run in {folder}" + (f", going on after {stage.cfg.fork}" if stage.cfg.fork else "")
    origin = f"going on after step {newest} in {folder}" if newest is not None else new
    yield "; ".join([origin, *changes])


def _where(stage: _Stage) -> str:
    mesh, train = stage.mesh, stage.cfg.train
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    return f"mesh: {axes} ({mesh.devices.flat[0].device_kind}); {train.batch} rows of {train.seq_len} a step"


# --- During the steps


def put_local(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch (`row_share`), or of any tree of arrays [B, T], onto its devices of the
    mesh, each with its columns."""
    sharding, share = NamedSharding(mesh, BATCH_SPEC), row_share(mesh)

    def put(x):
        rows = len(x) // len(share.places)  # of a place

        def of_device(index):
            mine = share.places.index((index[0].start or 0) // rows) * rows
            return x[mine : mine + rows, index[1]]

        return jax.make_array_from_callback((len(x) * share.parts, *x.shape[1:]), sharding, of_device)

    return jax.tree.map(put, batch)


class _HeldOut:
    """Evaluates every learner, a frozen one once: {"eval/ce", "eval/ce/DOMAIN" ...}."""

    def __init__(self, cfg: RunConfig, mesh: Mesh, domains: tuple[str, ...], batches: list[Batch]):
        self.cfg, self.mesh, self.domains, self.batches = cfg, mesh, domains, batches
        self.steps = {n: make_eval_step(x, mesh, len(domains)) for n, x in cfg.learners.items()}
        self.frozen: dict[str, dict[str, float]] = {}

    def __call__(self, state: TrainState) -> dict[str, float]:
        out = {}
        for name, step in self.steps.items():
            values = self.frozen.get(name) or evaluate(
                step, state.learners[name].params, self.batches, self.mesh, self.domains
            )
            if self.cfg.learners[name].optimizer is None:
                self.frozen[name] = values
            out |= {f"{prefix(name, self.cfg)}eval/{key}": value for key, value in values.items()}
        return out


class _Reporter:
    """Holds a step's metrics on the devices until the next step is under way, then fetches and writes them."""

    def __init__(self, stage: _Stage, console: Console, writers: Writers | None):
        self.cfg, self.domains, self.console, self.writers = stage.cfg, stage.domains, console, writers
        self.targets = stage.targets
        self.tokens_seen = stage.tokens_seen  # valid ones, of all steps that are finished
        self.domain_tokens = dict(stage.domain_tokens)  # the same by domain
        self.pass_tokens = stage.pass_tokens
        self._last = stage.stop
        self._throughput = Throughput(stage.cfg, stage.mesh)
        self._pending: tuple[int, Any, float] | None = None
        self._compiled = False

    def begin(self, step: int, metrics: Any, wait: float) -> None:
        """`step` was dispatched, after `wait` seconds for its batch."""
        self._pending = step, metrics, wait

    def finish(self, held_out: Callable[[], dict[str, float]] | None = None) -> None:
        """Wait for the step begun last, if any; where it is due or `held_out` gives an evaluation, write its record."""
        if self._pending is None:
            return
        (step, metrics, wait), self._pending = self._pending, None
        values = jax.device_get(metrics)
        for name, of in values.items():
            if not np.isfinite(of["grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: {name}'s gradient norm is {of['grad_norm']}, so its weights are lost; the newest "
                    f"checkpoint is from before. Lower its learning rate, or look at the data of this step"
                )
        sums = next(iter(values.values()))["sums"]  # learners see the same tokens
        tokens = int(sums.tokens)
        self.tokens_seen += tokens
        for name, count in zip(self.domains, np.asarray(sums.domain_tokens).tolist(), strict=True):
            self.domain_tokens[name] = self.domain_tokens.get(name, 0) + round(count)
        if self._compiled:
            self._throughput.add(float(tokens), wait)
        else:  # the first step's time was the compiler's
            self._throughput.restart()
            self._compiled = True
        self.console.advance(step)
        due = step == 1 or step == self._last or step % self.cfg.train.log_every == 0
        rates = self._throughput.report() if due or held_out else {}
        evaluation = held_out() if held_out else {}
        if self.writers and (due or evaluation):
            record = {**scalars(values, self.cfg, self.domains), **self._ages(step), **self._seen(), **rates,
                      **evaluation}  # fmt: skip
            self.writers.write(step, record)
            self.console.report(step, record)
        if self.writers and held_out:  # a checkpoint may follow: the file must have what came before it
            self.writers.flush()

    def _seen(self) -> dict[str, int | float]:
        """Labels trained on so far in the run, in all and by domain, and the passes over each domain that those make
        (by the tokens that one has, which are estimated; `llama4 data ledger` counts documents)."""
        out: dict[str, int | float] = {"tokens_seen": self.tokens_seen}
        for name in self.domains:
            seen = self.domain_tokens.get(name, 0)
            out |= {f"tokens_seen/{name}": seen, f"epoch/{name}": round(seen / self.pass_tokens[name], 4)}
        return out

    def _ages(self, step: int) -> dict[str, int]:
        """teacher_step: steps that a student's teacher had made when it made these targets, where that is known; and
        staleness, how many it has made since, of one that trains in this run."""
        out = {}
        for name, learner in self.cfg.learners.items():
            teacher, start = learner.distillation.teacher, prefix(name, self.cfg)
            if teacher in self.targets:
                out[f"{start}teacher_step"] = self.targets[teacher].identity.teacher_step
            elif teacher and self.cfg.learners[teacher].optimizer:
                out |= {f"{start}teacher_step": step - 1, f"{start}staleness": 0}
        return out

    def restart(self) -> None:
        """Leave out of the throughput what was done since the last step."""
        self._throughput.restart()


class _Stop:
    """SIGTERM and SIGINT ask for a checkpoint and the end after the step under way; a second one ends at once.

    With several processes JAX's own notifier sees SIGTERM, and all of them stop after the same step.
    """

    signal: int | None = None

    def __enter__(self) -> _Stop:
        self._before: dict[int, Any] = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        text = f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint; again to stop at once\n"
        os.write(2, text.encode())  # print is not safe in a handler

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


# --- After the last step


def _summary(cfg: RunConfig, folder: epath.Path, step: int, stopped: int | None) -> dict[str, Any]:
    records = read(folder)
    return dict(folder=str(folder), step=step, steps=cfg.train.steps, complete=step >= cfg.train.steps,
                signal=stopped and int(stopped), metrics=records[-1] if records else {})  # fmt: skip


def _farewell(summary: dict[str, Any]) -> str:
    if summary["complete"]:
        return f"{summary['folder']} is complete: {summary['step']} steps"
    name = signal.Signals(summary["signal"]).name
    return (
        f"{name}: stopped after step {summary['step']} of {summary['steps']}, checkpoint saved; "
        f"the same command goes on from there in {summary['folder']}"
    )


def _say(log: Callable[[str], object] | None, summary: dict[str, Any], text: str) -> dict[str, Any]:
    (log or print)(text)
    return summary
