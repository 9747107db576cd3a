"""Whatever people have into ArrayRecord shards, which are read at random: `convert` plans, runs and sums up.

The plan cuts the inputs into tasks of about a shard of text each: several small files, a range of bytes of a large
JSONL file, some row groups of Parquet. A compressed file or a tar cannot be cut, so its task may write several shards,
and how many is not known before: shards are called NAME-TASK-SHARD.array_record, and DIR/manifest.json, written last,
lists them. The plan depends on the inputs and the options alone, so the output is the same bytes whatever the workers.

DIR/.convert/plan.json holds the options and the inputs. After a kill the same command goes on: sealed shards
(`data/shards.py`) are verified and kept, and what they hold of an input is passed over.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from etils import epath

from data.array_record import MANIFEST, MANIFEST_VERSION, index_of
from data.cache import fingerprint
from data.index import text_names
from data.records import FORMATS, InputError, InputPart, suffix_of
from data.shards import EXAMPLES, STATE, WRITER, Options, Seal, Task, read_json, read_seals, run_task

VERSION = 1  # of the plan
COMPRESSION = 4  # what compressed text is taken to grow by, where tasks are cut
EVERY = 5.0  # seconds
Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    options: Options
    inputs: list[dict[str, Any]]  # file, size, mtime
    tasks: list[Task]
    left_out: Counter[str]  # files of a folder that are no documents, by suffix

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "options": asdict(self.options), "inputs": self.inputs}


def make_plan(paths: Sequence[epath.PathLike], folder: epath.PathLike, options: Options) -> Plan:
    """The tasks for files and folders of them, which are walked in the order of their names.

    Raises:
      FileNotFoundError: a path is not there
      ValueError: a file of another format is named, a file comes twice, there is none, or Parquet has no text
    """
    formats = FORMATS | dict.fromkeys(options.plain, "text")
    inputs: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for path in map(epath.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"nothing to convert at {path}")
        if not path.is_dir() and not suffix_of(path.name, formats):
            raise ValueError(f"{path} is none of {', '.join(formats)}; --plain SUFFIX takes others as plain text")
        for file, stat in _walk(path, epath.Path(folder)):
            if suffix_of(file.name, formats):
                inputs.append(dict(file=str(file), size=stat.length, mtime=stat.mtime))
            else:
                left_out[file.suffix or file.name] += 1
    if not inputs:
        raise ValueError(f"no file to convert in {', '.join(map(str, paths))}: of {', '.join(formats)}")
    if twice := [file for file, count in Counter(i["file"] for i in inputs).items() if count > 1]:
        raise ValueError(f"{twice[0]} comes twice among the inputs")
    key = fingerprint([VERSION, WRITER, json.dumps([asdict(options), inputs])])
    parts = (part for i in inputs for part in _parts(i["file"], i["size"], formats, options))
    tasks = [
        Task(str(folder), f"{options.name}-{number:05d}", group, options, key)
        for number, group in enumerate(_gather(parts, options.shard_mb << 20))
    ]
    return Plan(options, inputs, tasks, left_out)


def _walk(path: epath.Path, output: epath.Path) -> Iterator[tuple[epath.Path, Any]]:
    stat = path.stat()
    if not stat.is_directory:
        yield path, stat
    elif path != output:
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry != path:  # a store may list a folder in itself
                yield from _walk(entry, output)


def _parts(file: str, size: int, formats: dict[str, str], options: Options) -> Iterator[InputPart]:
    suffix = suffix_of(file, formats)
    kind, shard = formats[suffix], options.shard_mb << 20
    if kind == "parquet":
        yield from _row_groups(file, options)
    elif suffix == ".jsonl":
        for start in range(0, max(size, 1), shard):
            length = min(shard, size - start)
            yield InputPart(file, kind, length, length, start, start + length)
    else:
        yield InputPart(file, kind, size, size * COMPRESSION if suffix.endswith(("gz", ".zst")) else size)


def _row_groups(file: str, options: Options) -> Iterator[InputPart]:
    """Row groups one by one, so that tasks may hold any number."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with epath.Path(file).open("rb") as content:
        try:
            metadata = ParquetFile(pa.PythonFile(content, "r")).metadata
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not Parquet, or cut short ({error})") from error
        names = metadata.schema.to_arrow_schema().names
        if not set(text_names(options.text_field)) & set(names):
            wanted = " or ".join(map(repr, text_names(options.text_field)))
            raise ValueError(f"{file} has no column {wanted}; it has {', '.join(names)} (--text-field names another)")
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(c) for c in range(metadata.num_columns)]
            size = sum(c.total_compressed_size for c in columns)
            yield InputPart(file, "parquet", size, sum(c.total_uncompressed_size for c in columns), group, group + 1)


def _gather(parts: Iterable[InputPart], weight: int) -> Iterator[tuple[InputPart, ...]]:
    """Parts in their order, in groups of the given weight at most or of one part; a file's neighbours are joined."""
    group: list[InputPart] = []
    total = 0
    for part in parts:
        if group and total + part.weight > weight:
            yield tuple(group)
            group, total = [], 0
        total += part.weight
        if group and (group[-1].file, group[-1].stop) == (part.file, part.start) and part.start:
            last = group.pop()
            size, joined = last.size + part.size, last.weight + part.weight
            part = InputPart(part.file, part.format, size, joined, last.start, part.stop)
        group.append(part)
    if group:
        yield tuple(group)


def convert(paths: Sequence[epath.PathLike], folder: epath.PathLike, options: Options, *, workers: int = 1,
            budget: float = 0.001, again: bool = False, beam: Sequence[str] | None = None,
            log: Log = print, every: float = EVERY) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Converts files and folders of them into `folder`; returns its manifest, and whether there was anything to do.

    Args:
      workers: processes; the output does not depend on them
      budget: the share of records that may be bad
      again: start over where the inputs or the options changed
      beam: Apache Beam's options, where a pipeline is to run the tasks
      every: seconds between two lines of progress to `log`
    Raises:
      ValueError, FileNotFoundError: as `make_plan` and `manifest`; or `folder` holds something else
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"--bad-records {budget:g} is no share: 0 to 1")
    if workers < 1:
        raise ValueError(f"{workers} workers: at least 1 is needed")
    target, plan = epath.Path(folder), make_plan(paths, folder, options)
    done = _prepare(target, plan, again)
    if done is not None:
        return done, False
    tasks = [replace(task, patience=0) for task in plan.tasks] if budget == 1 else plan.tasks
    if beam is not None:
        _run_beam(tasks, beam)
        seals = [read_seals(task) for task in tasks]
    else:
        seals = _run(tasks, workers, log, every)
    found = manifest(plan, [seal for task in seals for seal in task], budget)
    (target / MANIFEST).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return found, True


def _prepare(folder: epath.Path, plan: Plan, again: bool) -> dict[str, Any] | None:
    """Makes the folder ready for the plan; or the manifest, where all of it is done."""
    state, written = folder / STATE / "plan.json", folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the shards")
    if folder.exists() and any(folder.iterdir()) and not state.exists():
        raise ValueError(f"{folder} is not empty and holds no conversion: name a new folder")
    earlier, wanted = read_json(state), json.loads(json.dumps(plan.to_json()))
    if earlier is not None and earlier != wanted:
        if not again:
            raise ValueError(
                f"{folder} was made from other input: {_differences(earlier, wanted)}; --again starts over"
            )
        _clear(folder)
        earlier = None
    if earlier is None:
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(wanted))
        return None
    found = read_json(written)
    if found is not None:
        if all(_there(folder, shard) for shard in found["shards"]):
            return found
        written.unlink()
    return None


def _there(folder: epath.Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.exists() and path.stat().length == shard["size"] and index_of(path).exists()


def _differences(earlier: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is different, in words: options, then files."""
    if earlier["version"] != wanted["version"]:
        return f"version {earlier['version']} of the conversion, now {wanted['version']}"
    before, now = earlier["options"], wanted["options"]
    changed = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    was, now = ({i["file"]: i for i in plan["inputs"]} for plan in (earlier, wanted))
    files = [f"{f} is new" for f in now if f not in was] + [f"{f} is gone" for f in was if f not in now]
    files += [f"{f} changed" for f in now if f in was and now[f] != was[f]]
    changed += files[:3] + ([f"{len(files) - 3} more files"] if len(files) > 3 else [])
    return ", ".join(changed) or "the files come in another order"


def _clear(folder: epath.Path) -> None:
    """Removes a conversion: first what says that it is whole, last what says that the folder is one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.name.endswith((".array_record", ".index.npz")):
            path.unlink()
    for path in list((folder / STATE).iterdir()):
        if path.name != "plan.json":
            path.unlink()
    (folder / STATE / "plan.json").unlink()


class _Progress:
    """Counts of all workers, in shared memory; a line about them every few seconds while the block runs."""

    def __init__(self, tasks: Sequence[Task], log: Log, every: float):
        self.counts = multiprocessing.get_context("spawn").Array("q", 4)
        self._total = max(sum(task.size for task in tasks), 1)
        self._log, self._every = log, every
        self._begun, self._ended = time.monotonic(), threading.Event()

    def line(self) -> str:
        read, documents, text, kept = self.counts.get_obj()[:]  # unlocked: a worker that is killed may hold the lock
        seconds = max(time.monotonic() - self._begun, 1e-3)
        left = max(self._total - kept - read, 0)
        eta = f"  {timedelta(seconds=round(left * seconds / read))} left" if read else ""
        share = min((read + kept) / self._total, 1)
        return (
            f"convert {share:.0%} of {self._total / 1e6:,.0f} MB  {documents:,} documents  "
            f"{text / seconds / 1e6:.1f} MB/s of text  {documents / seconds:,.0f} documents/s{eta}"
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        thread = threading.Thread(target=self._show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._log(self.line())

    def _show(self) -> None:
        while not self._ended.wait(self._every):
            self._log(self.line())


class _Reporter:
    """A task's `Report`, into shared counts: documents with the next bytes read, as locks take time."""

    def __init__(self, counts: Any):
        self._counts = counts
        self._documents = self._text = 0

    def __call__(self, read: int = 0, documents: int = 0, text: int = 0, kept: int = 0) -> None:
        self._documents += documents
        self._text += text
        if documents:
            return
        with self._counts.get_lock():
            for i, amount in enumerate((read, self._documents, self._text, kept)):
                self._counts[i] += amount
        self._documents = self._text = 0


def _run(tasks: Sequence[Task], workers: int, log: Log, every: float) -> list[list[Seal]]:
    """The seals of all tasks, in this process or in a pool, whose processes do not outlive this one."""
    progress = _Progress(tasks, log, every)
    workers = min(workers, len(tasks))
    with progress.shown():
        if workers == 1:
            report = _Reporter(progress.counts)
            return [run_task(task, report) for task in tasks]
        # Forking is unsafe where threads run, as jax's do.
        context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
        pool = ProcessPoolExecutor(workers, context, _start_worker, (progress.counts,))
        try:
            futures = [pool.submit(_work, task) for task in tasks]
            wait(futures, return_when=FIRST_EXCEPTION)
            first = next((f for f in futures if f.done() and f.exception()), None)
            if first is not None:
                raise first.exception() or AssertionError
            return [future.result() for future in futures]
        except InputError as error:  # said here, so that the traceback ends in this project
            raise InputError(*error.args) from error
        except BrokenProcessPool as error:
            raise RuntimeError("a worker was killed, out of memory? The same command goes on") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            pool.shutdown()


_report: _Reporter


def _start_worker(counts: Any) -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent is gone leaves, lest it writes beside the next run."""
    global _report
    _report = _Reporter(counts)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(task: Task) -> list[Seal]:
    return run_task(task, _report)


def _run_beam(tasks: Sequence[Task], arguments: Sequence[str]) -> None:
    """The tasks in an Apache Beam pipeline, whose workers need this project and the inputs' and folder's stores."""
    try:
        import apache_beam as beam  # type: ignore
        from apache_beam.options.pipeline_options import PipelineOptions  # type: ignore
    except ModuleNotFoundError as error:
        raise ImportError("--runner beam needs Apache Beam: pip install -e '.[beam]'") from error
    with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
        _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(run_task)


def manifest(plan: Plan, seals: Iterable[Seal], budget: float) -> dict[str, Any]:
    """What the seals of all tasks add up to.

    Raises:
      ValueError: no document, or more than `budget` of the records are bad
    """
    shards, examples = [], []
    skipped, left_out = Counter[str](), Counter[str]()
    for seal in seals:
        if seal["files"]:
            (name, size, digest), (_, _, index) = seal["files"]
            shards.append(dict(file=name, documents=seal["documents"], bytes=seal["bytes"], hash=digest, size=size,
                               index_hash=index))  # fmt: skip
        skipped.update(seal["skipped"])
        left_out.update(seal["left_out"])
        examples += seal["examples"]
    documents, bad = sum(shard["documents"] for shard in shards), skipped.total()
    counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
    where = "; first: " + describe(examples[0]) if examples else ""
    if not documents:
        raise ValueError(f"no documents in the inputs ({counts or 'no records'}){where}")
    if bad > budget * (bad + documents):
        above = f"{bad:,} of {bad + documents:,} records are bad, above the share {budget:g} of --bad-records"
        raise ValueError(f"{above}: {counts}{where}")
    return dict(
        version=MANIFEST_VERSION,
        documents=documents,
        bytes=sum(shard["bytes"] for shard in shards),
        shards=shards,
        skipped=dict(sorted(skipped.items())),
        examples=examples[:EXAMPLES],
        left_out=dict(fields=dict(sorted(left_out.items())), files=dict(sorted(plan.left_out.items()))),
        inputs=[dict(file=i["file"], size=i["size"]) for i in plan.inputs],
    )


def describe(example: dict[str, Any]) -> str:
    """Where a skipped record is and why it was skipped, in a line."""
    unit = "byte" if "byte" in example else "record"
    detail = f" ({example['detail'][:200]})" if example["detail"] else ""
    return f"{example['file']}, {unit} {example[unit]}: {example['reason']}{detail}"
