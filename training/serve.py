"""A teacher that answers students of other programs (`training/stream.py`): targets of the rows that they send.

One thread runs the teacher, batch after batch in the order in which they came. Each student has two threads, one that
reads its questions and one that sends its answers, and `WINDOW` places: a question takes one before it is read and
gives it back when its answer is sent, so that a student which asks and never reads fills its own places, then the
system's buffers, and then waits; the server's memory does not grow, and the other students go on.
"""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import numpy as np

from data.batch import Batch
from llama4_jax.axes import BATCH_AXES, CONTEXT
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import stream
from training import target_record as record_format
from training.config import RunConfig
from training.loop import put_local
from training.mesh import check_fits, make_mesh
from training.start import check_init, given_params
from training.stream import ASKED_BYTES, MOST_TOKENS, PROTOCOL, SILENCE, Socket
from training.target_record import Form
from training.targets import Identity, Pieces, names, pieces
from training.teach import find_teacher, make_teach_step, teacher_id

WINDOW = 4
"""Batches of a student that the server holds, asked or answered."""
STUDENTS = 256
"""Connections at a time."""
KEPT_BYTES = 2**30
"""Of answers that are kept for other students of the same rows."""
SECONDS = 5.0  # between lines of progress, and between the signs of life of a teacher at work

Teacher = Callable[[Batch], Callable[[], SparseTargets]]
"""Begins on a batch [B, T]; what it returns waits for the targets, numpy arrays [B, T, K] and [B, T]."""


class Job(NamedTuple):
    """A question that was read."""

    client: _Client
    number: int
    batch: Batch
    found: Pieces
    content: bytes  # hash of what the answer depends on


class Begun(NamedTuple):
    """What the devices work on."""

    job: Job
    targets: Callable[[], SparseTargets]


class Answer(NamedTuple):
    header: dict[str, Any]
    body: bytes


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, which nobody can connect to yet; port 0 takes a free one. ValueError where it is
    taken or not this machine's."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that was killed
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


class Server:
    """Answers students while it runs."""

    def __init__(
        self, teacher: Teacher, identity: Identity, chunk: int, listener: socket.socket, *, columns: int = 1,
        window: int = WINDOW, kept_bytes: int = KEPT_BYTES, log: Callable[[str], object] = print,
    ):  # fmt: skip
        """`chunk`: that which the teacher's model takes rows to be packed for. `listener`: a socket of `bind`. Lengths
        of rows are multiples of `columns`."""
        self.teacher, self.identity, self.chunk = teacher, identity, chunk
        self.columns, self.window, self.log = columns, window, log
        self.has = stream.facts(identity.tokenizer, identity.vocab_size, chunk, identity.form, identity.teacher)
        self.jobs: queue.Queue[Job] = queue.Queue()  # bounded by the students' windows
        self.clients: set[_Client] = set()
        self.stopping = threading.Event()
        self.computed = self.answered = 0  # tokens, without and with those of kept answers
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes, self._kept_size = kept_bytes, 0
        self._listener = listener
        self._listener.settimeout(0.2)
        host, port, *_ = listener.getsockname()
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def run(self) -> None:
        """Answer until `stopping` is set, and then what was asked before."""
        self._listener.listen()
        self.log(f"listening on {self.address}")
        accepting = threading.Thread(target=self._accept, daemon=True)
        accepting.start()
        progress = _Progress(self)
        begun: Begun | None = None
        try:
            while not self.stopping.is_set() or begun or not self.jobs.empty():
                begun = self._turn(begun)
                progress.advance()
        finally:
            self.stopping.set()
            accepting.join()
            self._listener.close()
            for client in list(self.clients):
                client.close()
            progress.line()

    def _turn(self, before: Begun | None) -> Begun | None:
        """Have the devices begin on what comes next, and meanwhile encode what they began on before."""
        job = begun = body = None
        with suppress(queue.Empty):
            job = self.jobs.get_nowait() if before else self.jobs.get(timeout=0.1)
        if job:
            body = self._kept.get(job.content)
            if body is None and not (before and before.job.content == job.content):
                begun = Begun(job, self.teacher(job.batch))
        if before:
            made = self._encode(*before)
            self._answer(before.job, made)
            body = made if job and before.job.content == job.content else body
        if job and body is not None:
            if job.content in self._kept:
                self._kept.move_to_end(job.content)
            self._answer(job, body)
        return begun

    def welcome(self) -> dict[str, Any]:
        return dict(what="welcome", facts=self.has, identity=self.identity.to_json(), window=self.window)

    def _accept(self) -> None:
        while not self.stopping.is_set():
            with suppress(OSError):  # most often that nobody came
                connected, address = self._listener.accept()
                if len(self.clients) >= STUDENTS:
                    connected.close()
                    continue
                client = _Client(self, connected, f"{address[0]}:{address[1]}")
                self.clients.add(client)
                client.start()

    def _encode(self, job: Job, targets: Callable[[], SparseTargets]) -> bytes:
        """The records of its pieces, kept for whoever asks the same."""
        flat = SparseTargets._make(x.reshape(-1, *x.shape[2:]) for x in targets())
        parts = []
        for key, start, stop in zip(job.found.keys, job.found.starts.tolist(), job.found.stops.tolist(), strict=True):
            of_piece = SparseTargets._make(x[start:stop] for x in flat)
            parts.append(record_format.encode(self.identity.form, key, of_piece))
        body = b"".join(parts)
        self.computed += _tokens(job)
        self._kept[job.content] = body
        self._kept_size += len(body)
        while self._kept_size > self._kept_bytes and len(self._kept) > 1:
            self._kept_size -= len(self._kept.popitem(last=False)[1])
        return body

    def _answer(self, job: Job, body: bytes) -> None:
        self.answered += _tokens(job)
        header = dict(what="answer", number=job.number, teacher_step=self.identity.teacher_step)
        job.client.answers.put(Answer(header, body))


class _Client:
    """A student's connection: its two threads, its places."""

    def __init__(self, server: Server, connected: socket.socket, name: str):
        self.server, self.name = server, name
        self.transport = Socket(connected, SILENCE)
        self.answers: queue.Queue[Answer | None] = queue.Queue()  # None: no more
        self._places = threading.Semaphore(server.window)
        self.held = 0  # questions read and not answered
        self._lock, self._gone = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._write)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Once what it asked for is on its way; a student that does not read is left after a few seconds."""
        self.transport.stop_receiving()
        self.answers.put(None)
        self._threads[1].join(SECONDS)
        self.transport.close()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        try:
            self._greet()
            while not (self.server.stopping.is_set() or self._gone.is_set()):
                # Nothing is read, and the student's own program waits, while there is no place for it.
                if not self._places.acquire(timeout=0.2):
                    continue
                job = self._question(*self.transport.receive(MOST_TOKENS * ASKED_BYTES))
                with self._lock:
                    self.held += 1
                self.server.jobs.put(job)
        except OSError:  # the student is gone, or done
            pass
        except Exception as error:  # whatever a student sends, the others go on
            why = str(error) if isinstance(error, ValueError) else f"what came is no question ({error!r})"
            self.server.log(f"refused {self.name}: {why}")
            self.answers.put(Answer(dict(what="refused", why=why), b""))
        if not self.server.stopping.is_set():  # else what it asked for is still answered
            self.answers.put(None)

    def _greet(self) -> None:
        header, _ = self.transport.receive(0)
        if header.get("what") != "hello" or header.get("protocol") != PROTOCOL:
            raise ValueError(f"the teacher has version {PROTOCOL} of the protocol, but the student version "
                             f"{header.get('protocol')}")  # fmt: skip
        if line := stream.disagreement(header["facts"], self.server.has):
            raise ValueError(line)
        self.transport.send(self.server.welcome())
        self.transport.expect_signs(None)  # a student may be silent for hours

    def _question(self, header: dict[str, Any], body: bytearray) -> Job:
        """ValueError for rows that the teacher cannot take."""
        number, (rows, length) = int(header["number"]), header["shape"]
        if header["what"] != "ask" or min(rows, length) < 1 or ASKED_BYTES * rows * length != len(body):
            raise ValueError(f"{len(body):,} bytes are no {rows} rows of {length} tokens")
        if length % self.server.columns:
            raise ValueError(f"rows of {length} tokens do not divide over the teacher's mesh.context "
                             f"({self.server.columns})")  # fmt: skip
        batch = stream.unpack_rows((rows, length), body)
        ids = np.concatenate([batch.tokens, batch.labels])
        if ids.min() < 0 or ids.max() >= self.server.identity.vocab_size:
            raise ValueError(f"ids of {ids.min()} to {ids.max()} are not of a vocabulary of "
                             f"{self.server.identity.vocab_size}")  # fmt: skip
        found = pieces(batch)
        return Job(self, number, batch, found, blake2b(b"".join(found.keys), digest_size=16).digest())

    def _write(self) -> None:
        with suppress(OSError):
            while (answer := self._next()) is not None:
                self.transport.send(*answer)
                if answer.header["what"] == "answer":
                    with self._lock:
                        self.held -= 1
                    self._places.release()
        self._gone.set()
        self.server.clients.discard(self)
        self.transport.close()

    def _next(self) -> Answer | None:
        """What is sent next; a sign of life where the answer to a question takes its time."""
        while True:
            with suppress(queue.Empty):
                return self.answers.get(timeout=SECONDS)
            if self.held:
                return Answer(dict(what="busy"), b"")


def _tokens(job: Job) -> int:
    return int((job.found.stops - job.found.starts).sum())


class _Progress:
    """A line every few seconds in which there was something to do."""

    def __init__(self, server: Server):
        self.server, self._said, self._tokens = server, time.monotonic(), (0, 0)

    def advance(self) -> None:
        if time.monotonic() - self._said >= SECONDS:
            self.line()

    def line(self) -> None:
        server, spent = self.server, time.monotonic() - self._said
        before, self._tokens = self._tokens, (server.answered, server.computed)
        self._said = time.monotonic()
        if self._tokens == before and not any(client.held for client in list(server.clients)):
            return
        answered, computed = ((now - then) / max(spent, 1e-9) for now, then in zip(self._tokens, before, strict=True))
        server.log(f"targets: {len(server.clients)} students, {server.jobs.qsize()} batches waiting; {answered:,.0f} "
                   f"tokens/s answered, {computed:,.0f} computed; {server.answered:,} tokens in all")  # fmt: skip


# --- A preset's teacher


def make_teacher(cfg: RunConfig, name: str, params: Any, mesh: Any, form: Form) -> Teacher:
    """Rows of any number, at most `cfg.train.batch` of them at a time, filled up to what the mesh divides."""
    step = make_teach_step(cfg.learners[name], mesh, form)
    multiple = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * cfg.learners[name].microbatches

    def begin(batch: Batch) -> Callable[[], SparseTargets]:
        rows, of_tokens = len(batch.tokens), names(pieces(batch), batch.tokens.shape)
        begun = []
        for first in range(0, rows, cfg.train.batch):
            some = jax.tree.map(lambda x, first=first: x[first : first + cfg.train.batch], (batch, of_tokens))
            full = jax.tree.map(lambda x: np.pad(x, ((0, -len(x) % multiple), (0, 0))), some)
            begun.append(step(params, *put_local(full, mesh)))

        def finish() -> SparseTargets:
            return jax.tree.map(lambda *xs: np.concatenate(xs)[:rows], *map(jax.device_get, begun))

        return finish

    return begin


def make_server(
    cfg: RunConfig, tokenizer: str, form: Form, host: str, port: int, *, learner: str = "",
    log: Callable[[str], object] = print,
) -> Server:  # fmt: skip
    """A server of the preset's teacher, on the mesh of its first stage; `tokenizer` is the hash of the teacher's.

    ValueError, FileNotFoundError: as `teach.teach`, or where this program is of several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(f"a teacher answers from one process with all of its devices, but this program has "
                         f"{jax.process_count()}: start a server on each, for some of the students' processes "
                         "each")  # fmt: skip
    name, cfg = find_teacher(cfg, learner), cfg.at(0)
    check_init(cfg, name, tokenizer)
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    listener = bind(host, port)  # before the weights are read, which takes its time
    try:
        params, step = given_params(cfg, name, mesh)
        model, init = cfg.learners[name].model, cfg.learners[name].init
        identity = Identity(tokenizer, model.vocab_size, teacher_id(params, model), step, form, init)
        teacher = make_teacher(cfg, name, params, mesh, form)
    except BaseException:
        listener.close()
        raise
    log(f"teacher: {name}, {init} at step {step}, {identity.teacher}; {form}")
    return Server(teacher, identity, model.chunk, listener, columns=mesh.shape[CONTEXT], log=log)


@contextmanager
def stopped_by_signals(server: Server):
    """SIGTERM and SIGINT end it after what is under way, a second one at once."""

    def receive(number: int, _: Any) -> None:
        if server.stopping.is_set():
            raise KeyboardInterrupt
        server.stopping.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
