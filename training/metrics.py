"""What a run reports: scalars of a step, throughput and MFU, and the writers (JSONL, TensorBoard, the console)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import scalar

from training import goodput, profile, status
from training.chips import peak_flops
from training.config import Learner, RunConfig
from training.flops import step_per_token
from training.redact import redact

FILE = status.METRICS
SINKS: list[Callable[[int, Mapping[str, float]], object]] = []
"""Who else gets the scalars of every record (`training/trackers.py`)."""

# --- Scalars of one step


def scalars(metrics: Mapping[str, Any], cfg: RunConfig, domains: Sequence[str]) -> dict[str, Any]:
    """A step's metrics (`training/step.py`, on the host) as a flat dict; in runs of several learners keys begin NAME/.

    Means over the step's valid tokens, in nats (`measured`, `taught`); loss = h ce + s t^2 D + c_b balance + c_z z
    (`objectives.py`).
    imbalance/LAYER: load of the busiest expert over the mean load (1: balanced); imbalance: of the worst layer.
    dropped: share of routed tokens that found no room, under a dispatch that can drop.
    expert_share: [MoE layers][E], a table that only the JSONL file gets.
    """
    out: dict[str, Any] = {}
    for name, of in metrics.items():
        out |= {prefix(name, cfg) + key: x for key, x in _learner_scalars(of, cfg.learners[name], domains).items()}
    return out


def prefix(learner: str, cfg: RunConfig) -> str:
    """What a learner's metrics begin with: nothing where it is alone."""
    return f"{learner}/" if len(cfg.learners) > 1 else ""


def _learner_scalars(metrics: Mapping[str, Any], learner: Learner, domains: Sequence[str]) -> dict[str, Any]:
    sums = metrics["sums"]
    tokens = max(float(sums.tokens), 1.0)
    out = measured(sums, domains)
    loss = out["ce"]
    if learner.distillation.teacher:
        out |= taught(sums, domains)
        loss = float(np.sum(sums.by_domain["weighted"]) / tokens)
    balance, z = float(sums.balance) / tokens, float(sums.z) / tokens
    loss += learner.router_balance * balance + learner.router_z * z
    out = {"loss": loss, **out, "balance": balance, "z": z, "grad_norm": float(metrics["grad_norm"]),
           "learning_rate": float(metrics["learning_rate"]), "tokens": float(sums.tokens)}  # fmt: skip
    if learner.model.num_moe_layers:
        load = np.asarray(sums.load, np.float64)
        share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        worst = share.max(axis=1) * share.shape[1]
        layers = [i for i in range(learner.model.num_layers) if learner.model.pattern[i % learner.model.period].moe]
        out["imbalance"] = float(worst.max())
        if learner.dispatch != "fsdp":
            out["dropped"] = float(np.asarray(sums.dropped, np.float64).sum() / max(load.sum(), 1))
        out |= {f"imbalance/{i}": float(w) for i, w in zip(layers, worst, strict=True)}
        out["expert_share"] = share.round(4).tolist()
    return out


def measured(sums: Any, domains: Sequence[str]) -> dict[str, float]:
    """{NAME, NAME/DOMAIN ...}: ce; where they were measured, accuracy, entropy and ece of the predictions.

    accuracy: share of labels than which no token is likelier; ece: sum over bins of confidence of their share of the
    tokens times |accuracy - confidence| in them (expected calibration error).
    """
    found = {"ce": "ce", "entropy": "entropy", "correct": "accuracy"}
    out: dict[str, float] = {}
    for name, called in found.items():
        if name in sums.by_domain:
            out |= domain_means(called, sums.by_domain[name], sums.domain_tokens, domains)
    if sums.calibration is not None:
        _, confidence, hits = np.moveaxis(np.asarray(sums.calibration, np.float64), -1, 0)
        gap = np.abs(hits - confidence).sum(axis=-1)
        out |= domain_means("ece", gap, sums.domain_tokens, domains)
        out["ece"] = float(np.abs((hits - confidence).sum(axis=0)).sum() / max(np.sum(sums.domain_tokens), 1))
    return out


def taught(sums: Any, domains: Sequence[str]) -> dict[str, float]:
    """{NAME, NAME/DOMAIN ...} of a student, over tokens that have a target but for hard and missing.

    kl and reverse_kl: KL(teacher || student) and the other way, at temperature 1; divergence: D as it is minimised;
    teacher_ce, teacher_entropy; agreement: share of tokens where the teacher's likeliest one is the student's;
    teacher_better: where the teacher's CE is below the student's; hard, soft: mean weights of labels and of D;
    norm_ratio: mean |t^2 dD/dz| over mean |q - y|, and norm_cosine, of these gradients in the logits; missing: share
    of tokens without a target.
    """
    s = {name: np.asarray(x, np.float64) for name, x in sums.by_domain.items()}
    tokens, valid = s["tokens"], np.asarray(sums.domain_tokens, np.float64)
    names = ("kl", "reverse_kl", "divergence", "teacher_ce", "teacher_entropy", "agreement", "teacher_better", "soft")
    out = domain_means("hard", s["hard"], valid, domains) | domain_means("missing", valid - tokens, valid, domains)
    for name in names:
        if name in s:
            out |= domain_means(name, s[name], tokens, domains)
    out |= domain_means("norm_ratio", s["soft_norm"], s["hard_norm"], domains)
    product, squares = s["norm_product"], np.stack([s["hard_square"], s["soft_square"]])
    out |= domain_means("norm_cosine", product, np.sqrt(squares[0] * squares[1]), domains)
    hard, soft = squares.sum(axis=1)
    return out | {"norm_cosine": float(product.sum() / max(math.sqrt(hard * soft), 1e-30))}


def domain_means(name: str, sums: Any, counts: Any, domains: Sequence[str]) -> dict[str, float]:
    """{NAME, NAME/DOMAIN ...}: means of sums by domain, of the domains that have any."""
    total, count = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    by_domain = {f"{name}/{d}": float(t / n) for d, t, n in zip(domains, total, count, strict=True) if n > 0}
    return {name: float(total.sum() / count.sum()) if count.sum() > 0 else 0.0, **by_domain}


# --- Throughput


class Throughput:
    """Tokens, time and waiting since the last report; compilation, evaluation and saving are not counted."""

    def __init__(self, cfg: RunConfig, mesh: Mesh):
        self.flops = step_per_token(cfg)
        self.devices = mesh.devices.size
        self.peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since, self._steps, self._tokens, self._wait = time.perf_counter(), 0, 0.0, 0.0

    def add(self, tokens: float, wait: float) -> None:
        """A step is done: its valid tokens, and the seconds it waited for its batch."""
        self._steps, self._tokens, self._wait = self._steps + 1, self._tokens + tokens, self._wait + wait

    def report(self) -> dict[str, float]:
        """tokens_per_second, seconds_per_step, data_wait (share of the time), tflops a device and, if its peak is
        known, mfu = achieved model FLOPs over the peak; empty before the first step. Counts anew."""
        seconds, steps, tokens, wait = time.perf_counter() - self._since, self._steps, self._tokens, self._wait
        self.restart()
        if not steps:
            return {}
        rate = tokens / seconds
        flops = rate * self.flops / self.devices
        out = {"tokens_per_second": rate, "seconds_per_step": seconds / steps, "data_wait": wait / seconds}
        return out | {"tflops": flops / 1e12} | ({"mfu": flops / self.peak} if self.peak else {})


# --- Writers


class Writers:
    """A run's records, to `metrics.jsonl` and TensorBoard in its folder; of all processes the first one writes.

    One line a step. On resume the lines after the restored step are dropped, so that the file tells one story. Where
    files cannot be appended to (gs://, s3://), the file is written anew at every `flush`.
    """

    def __init__(self, folder: epath.Path, start: int):
        self._folder, self._file = folder, folder / FILE
        self._open(start)

    def rewind(self, step: int) -> None:
        """Drop what was written of later steps."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        self._lines = [json.dumps(record) for record in read(self._folder) if record["step"] <= step]
        with self._told("records"):
            self._rewrite()
        self._stream = None if "://" in str(self._folder) else self._file.open("a")
        self._board = _Board(self._folder / "tensorboard", step)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a line, without what is no number; its scalars go to TensorBoard, too."""
        record = {name: x for name, x in record.items() if not isinstance(x, float) or math.isfinite(x)}
        record = {**record, **goodput.counted()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **record})
        scalars = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        with self._told(f"the record of step {step}"):
            if self._stream:
                print(line, file=self._stream, flush=True)
            else:
                self._lines.append(line)
            self._board.write(step, scalars)
        for sink in SINKS:
            sink(step, scalars)

    def flush(self) -> None:
        """What was written so far is in the folder afterwards; to be called before each checkpoint."""
        with self._told("records"):
            if self._stream is None:
                self._rewrite()
            self._board.flush()

    def close(self) -> None:
        with self._told("records"), ExitStack() as stack:
            if self._stream:
                stack.callback(self._stream.close)
            stack.callback(self._board.close)
            self.flush()

    def _rewrite(self) -> None:
        self._file.write_text("".join(line + "\n" for line in self._lines))

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """An OSError says in a line what could not be written where."""
        try:
            yield
        except OSError as error:
            said = error.strerror or str(error)
            raise OSError(error.errno, f"{what} in {self._folder} could not be written: {said}") from error


class _Board:
    """TensorBoard's file, written as records come. (tensorboardX's own writer has a thread for that, which a full disk
    ends, and whoever then hands it something waits for ever.)"""

    def __init__(self, folder: epath.Path, step: int):
        """What there is of steps after `step` is not shown any more."""
        directory_check(str(folder))
        self._events = EventsWriter(str(folder / "events"), f".{step}")
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [one for name, x in scalars.items() for one in scalar(name, x).value]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The records of a run, in order, as `status.records` finds them."""
    return status.records(folder)


class Console:
    """What a person sees of a run: a progress bar on a terminal, else a line for every report."""

    def __init__(self, cfg: RunConfig, start: int, log: Callable[[str], object] | None = None):
        """`log` takes lines in place of the terminal."""
        self.cfg, self._log, self._progress = cfg, log or partial(print, flush=True), None
        if log is None and sys.stdout.isatty():
            columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"))
            self._task = self._progress.add_task("", total=cfg.train.steps, completed=start)
            self._progress.start()
            self._log = partial(self._progress.console.print, markup=False, highlight=False)

    def line(self, text: str) -> None:
        """One line, without secrets."""
        self._log(redact(text))

    def advance(self, step: int) -> None:
        """A step is done."""
        profile.after(step)
        if self._progress:
            self._progress.update(self._task, completed=step)

    def report(self, step: int, record: Mapping[str, Any]) -> None:
        """A record that was written: training metrics to the bar or a line, an evaluation always to a line."""
        text = describe(record, self.cfg)
        if self._progress:
            self._progress.update(self._task, description=text)
        else:
            left = (self.cfg.train.steps - step) * record.get("seconds_per_step", math.nan)
            eta = "" if math.isnan(left) else f"  {timedelta(seconds=round(left))} left"
            self._log(f"step {step}/{self.cfg.train.steps}  {text}{eta}")
        if held_out := {name: value for name, value in record.items() if "eval/ce" in name}:
            parts = "  ".join(f"{name.replace('eval/', '')} {value:.4f}" for name, value in held_out.items())
            self._log(f"step {step}/{self.cfg.train.steps}  held out: {parts}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def describe(record: Mapping[str, Any], cfg: RunConfig) -> str:
    """The few numbers of a record that fit in a line."""
    losses = [(f"{prefix(name, cfg)}loss", record.get(f"{prefix(name, cfg)}loss")) for name in cfg.learners]
    parts = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"MFU {record['mfu']:.1%}" if "mfu" in record else f"{record['tflops']:.3g} TFLOP/s a device")
    return "  ".join(parts)
