"""A run from its first step to its last: where it lies, what it starts from, the steps, what is kept of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from data.loader import Corpus
from training import fork, goodput
from training.checkpoint import Checkpoints, whole_place
from training.config import RunConfig
from training.evaluate import HeldOut
from training.first_batches import FirstBatches
from training.flops import active_matmul_parameters
from training.guard import BadStep, Guard
from training.lock import RunLock
from training.mesh import BATCH_SPEC, check_fits, make_mesh, row_share
from training.metrics import Console, Writers, read
from training.recheck import rechecked
from training.record import check_resumable, run_record, write_config
from training.reporter import Kept, Pending, Reporter
from training.start import check_init, initial_state, open_targets, stage_corpus
from training.state import abstract_state
from training.status import STOPPED
from training.step import make_train_step
from training.stop import Stop
from training.target_sources import read_ahead
from training.watchdog import Watchdog
from training.weighting import DOMAINS


def train(
    cfg: RunConfig,
    corpus: Corpus,
    log: Callable[[str], object] | None = None,
    begun: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Train until `cfg.train.steps`, going on from the newest good checkpoint in `cfg.folder`; returns the closing
    summary.

    The summary: folder, step, steps, complete, signal (that of SIGTERM or SIGINT which stopped the run after a last
    checkpoint, else None) and metrics (the last record). Losses are bit-identical whether or not a run was
    interrupted, on the same mesh. `log` takes the lines that otherwise go to the terminal; `begun` is called, by the
    first process, once nothing refuses the run any more and its folder is there.
    """
    goodput.begin()
    _check_vocabulary(cfg, corpus)
    _use_compilation_cache()
    if jax.process_index() > 0:
        log = log or (lambda _: None)  # the first process speaks for all
    folder, say = epath.Path(cfg.folder), log or print
    record = run_record(cfg, corpus.tokenizer.hash)
    with ExitStack() as stack:
        dog = stack.enter_context(Watchdog(folder, cfg.safety.stuck_after))

        # --- The folder: how far the run got, and whether this is the same run
        checkpoints = _begun(stack, folder, cfg)
        newest = checkpoints.newest_good(say) if checkpoints else None
        with _source(checkpoints if newest is not None else None, cfg) as source:
            if checkpoints and newest is not None:
                changes = check_resumable(checkpoints.record(newest), record, str(folder), newest)
                owed = _owed(checkpoints, newest, folder)
            else:
                changes, owed = _check_sources(cfg, corpus, source), None
            start, steps = _fork_step(cfg) if newest is None else newest, cfg.train.steps
            if start >= steps and not owed:
                done = f"{folder} is complete already: {start} steps of {steps}"
                return _say(log, _summary(cfg, folder, start, None), done)

            # --- The first stage: its mesh, the state on it, its data and compiled functions
            console = stack.enter_context(closing(Console(cfg, start, log)))
            corpora = _look_ahead(cfg, corpus, start, console.line)
            stage = _Stage(cfg, corpora[start], start, source, console.line)
        for line in _describe(stage, folder, newest, changes):
            console.line(line)

        # --- What is kept
        checkpoints = checkpoints or _begin(stack, folder, cfg)
        writers = None
        if jax.process_index() == 0:
            write_config(folder, cfg)
            if begun:
                begun()
            (folder / STOPPED).unlink(missing_ok=True)
            corpus.tokenizer.save(folder)
            writers = stack.enter_context(closing(Writers(folder, start)))
            if newest is None:
                stage.stream = FirstBatches(stage.stream, corpora[start], folder, start)
        run = _Run(folder, record, console, writers, checkpoints, dog, stack.enter_context(Stop(folder)))

        # --- The steps of a stage, and of the next, which begins from the checkpoint that they end with
        while True:
            try:
                step = _steps(run, stage)
            except BadStep as bad:
                stage = _go_back(run, stage, bad, cfg)
                continue
            if step >= steps or run.stop.signal is not None:
                break
            checkpoints.wait()
            multihost_utils.sync_global_devices("the checkpoint that the next stage begins from is written")
            stage = _Stage(cfg, corpora[step], step, checkpoints, console.line)
            console.line(f"after step {step}: {_where(stage)}")
        dog.beat(step, "writing the last checkpoint")
        checkpoints.wait()  # OSError if it was not written
        if run.stop.signal == signal.SIGTERM and jax.process_index() == 0:
            run.stop.mark(step)
    summary = _summary(cfg, folder, step, run.stop.signal)
    return _say(log, summary, _farewell(summary))


class _Run(NamedTuple):
    """What all stages of a run share."""

    folder: epath.Path
    record: dict[str, Any]
    console: Console
    writers: Writers | None
    checkpoints: Checkpoints
    dog: Watchdog
    stop: Stop


class _Stage:
    """Where the steps from `start` to `stop` are made: the mesh, the state on it, its data, its compiled functions."""

    def __init__(
        self, cfg: RunConfig, corpus: Corpus, start: int, source: Checkpoints | None, say: Callable[[str], object],
        elsewhere: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        """`source` holds the checkpoint of step `start`, None where the run begins with a state of its own; the data
        goes on from there, or from the place `elsewhere`."""
        self.start, self.stop = start, cfg.stage_end(start)
        self.cfg, self.corpus, self.domains = cfg.at(start), corpus, corpus.domains
        _check_schedules(self.cfg, start)
        self.mesh = make_mesh(self.cfg.mesh)
        check_fits(self.cfg, self.mesh)
        place = None
        if source:
            self.state, place = source.restore(start, abstract_state(self.cfg, self.mesh))
        else:
            self.state = initial_state(self.cfg, self.mesh, say)
        self.pass_tokens = corpus.pass_counted
        chunk = next(iter(cfg.learners.values())).model.chunk
        shape = (self.cfg.train.batch, self.cfg.train.seq_len, chunk)
        # A stage, or a fork, may read other rows than what was before it.
        forked = bool(cfg.fork) and start == _fork_step(cfg)
        self.kept = _kept(cfg, start, place or {}, forked)
        crossing = start in [stage.after for stage in cfg.stages] or forked
        here = elsewhere or place
        stream = corpus.train(*shape, self.cfg.train.seed, *row_share(self.mesh)[:2], here, crossing and not elsewhere)
        self.targets = open_targets(self.cfg, corpus.tokenizer.hash, say)
        given = {name: learner.distillation.teacher for name, learner in self.cfg.learners.items()}
        identities = {name: self.targets[where].identity for name, where in given.items() if where in self.targets}
        self.teachers = {name: identity.teacher for name, identity in identities.items()}
        if place and not forked:
            _check_teachers(place.get("teachers", {}), self.teachers)
        self.stream = read_ahead(stream, self.targets.values(), self.stop - start)
        held_out = corpus.heldout(*shape, self.cfg.train.eval_batches)
        self.held_out = HeldOut(self.cfg, self.mesh, self.domains, held_out)
        self.train_step = make_train_step(self.cfg, self.mesh, len(self.domains))

    def close(self) -> None:
        """Give up the devices' memory and stop reading."""
        self.stream.close()
        for source in self.targets.values():
            source.close()
        del self.state, self.train_step, self.held_out


def _steps(run: _Run, stage: _Stage) -> int:
    """The steps of a stage; returns the last one, at which there is a checkpoint.

    The metrics of one are fetched, and judged, while the next one runs.
    """
    step, train, dog, stop = stage.start, stage.cfg.train, run.dog, run.stop
    report = Reporter(stage.cfg, stage.mesh, stage.domains, stage.targets, stage.stop, stage.kept,
                      stage.pass_tokens, run.folder,
                      run.console, run.writers)  # fmt: skip

    def held_out(step: int, may_end: bool = True) -> dict[str, float]:
        def go_on() -> bool:
            dog.beat(step, "evaluating", compiles=True)
            return not (may_end and stop.requested())

        return stage.held_out(stage.state, go_on)

    with closing(stage):
        if report.owed and run.writers:
            run.writers.rewind(step - 1)  # it may have been made up for before, by a start of which no more is left
        report.settle(step, partial(held_out, step))  # an evaluation that was broken off
        if report.owed:
            return step
        for step in range(stage.start + 1, stage.stop + 1):
            first = step == stage.start + 1
            # The first is waited for in the second, by when other processes may still compile it.
            dog.beat(step - 1, "making a step", compiles=step <= stage.start + 2)
            asked = time.perf_counter()
            rows = next(stage.stream)
            targets = {source: put_local(of.look_up(rows), stage.mesh) for source, of in stage.targets.items()}
            batch = put_local(rows, stage.mesh)
            wait = time.perf_counter() - asked
            again = stage.cfg.safety.recheck_every
            train_step = rechecked(stage.train_step) if again and step % again == 0 else stage.train_step
            marked = jax.profiler.StepTraceAnnotation("train", step_num=step)  # a trace's viewer goes by steps
            with stop.nothing_to_save() if first else nullcontext(), marked:
                stage.state, metrics = train_step(stage.state, batch, targets)
            run.checkpoints.check()
            report.finish()
            report.begin(Pending(step, metrics, wait, rows, stage.stream.get_state()))
            stopping, last = stop.requested(), step == stage.stop
            evaluating = last or step % train.eval_every == 0
            if evaluating or stopping or step % train.checkpoint_every == 0:
                # Between stages there is no place for an evaluation that is made up for later.
                may_end = not last or stage.stop == run.record["config"]["train"]["steps"]
                report.finish(partial(held_out, step, may_end) if evaluating else dict)
                stopping = stopping or report.owed is not None
                if last or stopping or step % train.checkpoint_every == 0:
                    place = whole_place(stage.stream.get_state()) | report.kept() | {"teachers": stage.teachers}
                    run.checkpoints.save(step, stage.state, place, run.record)
                report.restart()
            if stopping:
                break
    return step


def _go_back(run: _Run, stage: _Stage, bad: BadStep, cfg: RunConfig) -> _Stage:
    """The stage anew, from its newest checkpoint of before the bad step, with the data of after it.

    FloatingPointError, in a line, where there is none or the run has gone back often enough.
    """
    checkpoints, say = run.checkpoints, run.console.line
    checkpoints.wait()
    multihost_utils.sync_global_devices("every process goes back")
    begins = max([0, *(other.after for other in cfg.stages if other.after <= stage.start)])
    for step in reversed([s for s in checkpoints.steps if begins <= s <= bad.oldest]):
        if not (found := checkpoints.problems(step)):
            break
        checkpoints.set_aside(step, "; ".join(found[:3]), say)
    else:
        raise FloatingPointError(f"{bad}; there is no checkpoint from before to go back to. Lower the learning rate, "
                                 "or look at the data of this step")  # fmt: skip
    # The checkpoint's own count is of when it was written: the run may have come back to it before.
    before = Guard(cfg.safety, stage.kept.guard).rollbacks
    if before >= cfg.safety.rollbacks:
        raise FloatingPointError(f"{bad}; the run went back {before} times already, safety.rollbacks allows no more. "
                                 f"The newest checkpoint is of step {step}: lower the learning rate, or look at the "
                                 "data of these steps")  # fmt: skip
    for later in [s for s in checkpoints.steps if s > step]:
        checkpoints.set_aside(later, f"the run went back from step {bad.step} to {step}", say)
    say(f"going back from step {bad.step} to the checkpoint of step {step}; the data of steps {step + 1} to {bad.step} "
        f"is left out ({before + 1} of {cfg.safety.rollbacks} times)")  # fmt: skip
    if run.writers:
        run.writers.rewind(step)
    run.dog.beat(step, "restoring", compiles=True)
    new = _Stage(cfg, stage.corpus, step, checkpoints, say, whole_place(bad.place))
    state = dict(new.kept.guard or {}) | {"rollbacks": before + 1, "in_a_row": 0}
    new.kept = new.kept._replace(guard=state)
    return new


# --- Before the first step


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


def _check_sources(cfg: RunConfig, corpus: Corpus, source: Checkpoints | None) -> list[str]:
    """What a new run begins from is there, and means by a token id what this run means by it; lines of how it differs.

    A folder without a tokenizer that is ours to read (a checkpoint from elsewhere) is taken at its word.
    """
    if source:  # of a fork
        step = _fork_step(cfg)
        if step >= cfg.train.steps:
            raise ValueError(f"{cfg.fork} is at or behind the end, train.steps = {cfg.train.steps}: give more steps")
        return fork.differences(cfg, source.record(step), corpus.tokenizer.hash)
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


def _begun(stack: ExitStack, folder: epath.Path, cfg: RunConfig) -> Checkpoints | None:
    """The checkpoints of a run that has any, which from here on no other process writes; else None."""
    begun = (folder / "checkpoints").exists()
    multihost_utils.sync_global_devices("every process has looked before one of them writes")
    return _open(stack, folder, cfg) if begun else None


def _begin(stack: ExitStack, folder: epath.Path, cfg: RunConfig) -> Checkpoints:
    """Those of a run that has none: its folder is made, and locked, only once nothing refuses the run.

    BlockingIOError where a run that was started at the same time is there by then.
    """
    checkpoints = _open(stack, folder, cfg)
    meanwhile = checkpoints.steps
    multihost_utils.sync_global_devices("every process has looked before one of them writes")
    if meanwhile:
        raise BlockingIOError(f"while this run began, another one wrote {folder} up to step {meanwhile[-1]}: the same "
                              "command goes on from there; for a run beside it give another --out")  # fmt: skip
    return checkpoints


def _open(stack: ExitStack, folder: epath.Path, cfg: RunConfig) -> Checkpoints:
    lock = stack.enter_context(RunLock(folder))
    kept = cfg.train.checkpoint_keep, cfg.train.checkpoint_keep_every
    return stack.enter_context(Checkpoints(folder, *kept, may_write=lock.check))


def _check_teachers(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """ValueError where a student's targets have become another teacher's. One that had none may begin to have some.

    By student; checkpoints of before have the place of the targets in the student's stead (`targets:DIR`), which may
    have been moved since: there any teacher that the run had will do.
    """
    of_places = {teacher for place, teacher in before.items() if ":" in place}
    for student, teacher in now.items():
        had = {before[student]} if student in before else of_places
        if had and teacher not in had:
            raise ValueError(
                f"{student} has learned from the teacher {', '.join(sorted(had))}, but now there are targets of "
                f"{teacher}: give those it had, or begin another run with --from"
            )


def _source(checkpoints: Checkpoints | None, cfg: RunConfig) -> AbstractContextManager[Checkpoints | None]:
    """The checkpoints that the run goes on from, its own or the ones it is a fork of; None for its beginning."""
    if checkpoints:
        return nullcontext(checkpoints)
    return Checkpoints(fork.parts(cfg.fork)[0]) if cfg.fork else nullcontext()


def _look_ahead(cfg: RunConfig, corpus: Corpus, start: int, say: Callable[[str], object]) -> dict[int, Corpus]:
    """What each stage from `start` on reads, by the steps before it; ValueError now for what would fail then.

    A stage for another number of devices than are here may be run elsewhere, so that it is only spoken of.
    """
    corpora, devices, done = {}, jax.device_count(), start
    while True:
        then = cfg.at(done)
        try:
            corpora[done] = stage_corpus(cfg, then, corpus, say)
            _check_domains(then, corpora[done])
            corpora[done].check_heldout(then.train.batch, then.train.eval_batches)
            if done == start or then.mesh.suits(devices):
                check_fits(then, make_mesh(then.mesh))
            else:
                say(f"after step {done} comes a mesh of other than the {devices} devices here: there this run ends, to "
                    "go on by the same command where they are")  # fmt: skip
        except ValueError as error:
            raise error if done == start else ValueError(f"after step {done}: {error}") from error
        if (done := cfg.stage_end(done)) >= cfg.train.steps:
            return corpora


def _owed(checkpoints: Checkpoints, step: int, folder: epath.Path) -> bool:
    """Whether the evaluation at a checkpoint was broken off, and has not been made up for since."""
    return bool(checkpoints.place(step).get("owed")) and all(record["step"] != step for record in read(folder))


def _kept(cfg: RunConfig, start: int, place: Mapping[str, Any], forked: bool) -> Kept:
    """What the reports after step `start` go on from. A fork counts on, but is another run: it owes nothing, and bad
    steps of its source are not its own. Where other rows begin losses are not compared with those before."""
    kept = Kept(**{name: place[name] for name in Kept._fields if name in place})
    if forked:
        return Kept(kept.tokens_seen, kept.domain_tokens)
    before, after = cfg.at(start - 1), cfg.at(start)
    if kept.guard and (before.data, before.train.seq_len) != (after.data, after.train.seq_len):
        guard = Guard(cfg.safety, kept.guard)
        guard.forget()
        kept = kept._replace(guard=guard.state())
    return kept


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
