"""Soft targets from a teacher's own program (`training/serve.py`), asked for before they are needed.

The student's process sends its rows, 16 bytes a token, a few batches ahead of their use; the teacher answers with the
records that a store would hold of their pieces (`training/target_record.py`), 36 to 220 bytes a token, in the order of
the questions. Both sides hold a bounded number of batches. After a loss of the connection the student asks again for
what it has no answer to.

Why sockets and not `jax.experimental.transfer`: records are packed bit by bit on hosts, and at 200 bytes a token
no path from device to device is needed. The transport is one small class, so that another can take its place.

A frame is a magic number, two lengths, a header of JSON and a body of raw bytes. Header by header:

| from | what | with | body |
|---|---|---|---|
| student | hello | protocol, facts: what it needs, None where it takes anything | |
| teacher | welcome | facts: what it has; identity, as in a store's manifest; window: batches it holds | |
| either | refused | why, in a line; the connection ends | |
| student | ask | number, shape [B, T] | int32 tokens, labels (~label where none counts), positions, segments |
| teacher | busy | every few seconds, while a question is open | |
| teacher | answer | number, teacher_step | a record for each piece, in the order of `targets.pieces` |
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from data.batch import Batch
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import target_record as record_format
from training.target_record import HEADER_BYTES, Form
from training.targets import Identity, Pieces, pieces, unpacked

PROTOCOL = 1
AHEAD = 4
"""Batches that a student has asked for and not used."""
PATIENCE = 600.0
"""Seconds that a student does without its teacher, together since its last answer."""
SILENCE = 60.0
"""Seconds without a sign of life after which the other side counts as gone."""
MOST_TOKENS = 2**24
"""Of a question."""
ASKED_BYTES = 16
"""Of a token in a question."""
_PAUSES = 0.1, 10.0  # before a student tries again: the first, and the longest
_PREFIX = struct.Struct("<4sIQ")  # magic, bytes of the header and of the body
_MAGIC = b"L4TS"
_MOST_HEADER = 2**16


# --- Frames


@runtime_checkable
class Transport(Protocol):
    """Carries frames between two programs, in order. An OSError says that the other side is gone."""

    def send(self, header: dict[str, Any], body: bytes = b"") -> None: ...

    def receive(self, limit: int) -> tuple[dict[str, Any], bytearray]:
        """The next frame; ValueError for what is none, or has a body of more bytes than `limit`."""
        ...

    def close(self) -> None: ...


class Socket:
    """Frames over a connected TCP socket."""

    def __init__(self, connected: socket.socket, timeout: float | None):
        """`timeout`: seconds without a byte that count as the other side's end; None: only the system knows."""
        connected.settimeout(timeout)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in dict(TCP_KEEPIDLE=30, TCP_KEEPINTVL=10, TCP_KEEPCNT=3).items():  # Linux's names
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket = connected

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        text = json.dumps(header).encode()
        self._socket.sendall(_PREFIX.pack(_MAGIC, len(text), len(body)) + text)
        if body:
            self._socket.sendall(body)

    def receive(self, limit: int) -> tuple[dict[str, Any], bytearray]:
        magic, header, body = _PREFIX.unpack(self._exactly(_PREFIX.size))
        if magic != _MAGIC or header > _MOST_HEADER:
            raise ValueError("what came is no message of llama4 targets")
        if body > limit:
            raise ValueError(f"a message of {body:,} bytes came where {limit:,} are the most")
        found = json.loads(bytes(self._exactly(header)))
        if not isinstance(found, dict):
            raise ValueError("what came is no message of llama4 targets")
        return found, self._exactly(body)

    def _exactly(self, size: int) -> bytearray:
        out = bytearray(size)
        at, view = 0, memoryview(out)
        while at < size:
            got = self._socket.recv_into(view[at:])
            if not got:
                raise ConnectionResetError("it closed the connection")
            at += got
        return out

    def expect_signs(self, timeout: float | None) -> None:
        """As the constructor's `timeout`."""
        self._socket.settimeout(timeout)

    def stop_receiving(self) -> None:
        """Whoever waits in `receive` gets a ConnectionError; sending goes on."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def place(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, :PORT or PORT; 127.0.0.1 by default. ValueError for another form."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"an address is HOST:PORT, with a port of at most 65535, not {address!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


# --- What both sides must agree on

_NAMED = dict(version="targets of version", tokenizer="tokenizer", vocab_size="a vocabulary of",
              chunk="rows packed in chunks of", kind="targets of kind", top="top", draws="draws",
              teacher="teacher")  # fmt: skip


def facts(tokenizer: str, vocab_size: int, chunk: int, form: Form | None = None, teacher: str | None = None
          ) -> dict[str, Any]:  # fmt: skip
    """What one side needs or has; None where it takes anything."""
    of_form = dict(kind=form and form.kind, top=form and form.top, draws=form and form.draws)
    return dict(version=record_format.VERSION, tokenizer=tokenizer, vocab_size=vocab_size, chunk=chunk, teacher=teacher,
                **of_form)  # fmt: skip


def disagreement(needs: dict[str, Any], has: dict[str, Any]) -> str:
    """A line that names both sides of the first of the facts in which student and teacher differ, or nothing."""
    for name, what in _NAMED.items():
        wanted = needs.get(name)
        if wanted is not None and wanted != has.get(name):
            return f"the teacher has {what} {has.get(name)}, but the student {what} {wanted}"
    return ""


# --- Rows


def pack_rows(batch: Batch) -> bytes:
    """What the targets of a batch depend on: the body of a question."""
    labels = np.maximum(batch.labels, 0)
    labels = np.where(np.asarray(batch.loss_mask) > 0, labels, ~labels)
    fields = (batch.tokens, labels, batch.positions, batch.segment_ids)
    return np.stack([np.asarray(x) for x in fields]).astype("<i4").tobytes()


def unpack_rows(shape: tuple[int, int], body: bytes | bytearray) -> Batch:
    """The batch [B, T] that `pack_rows` took, without domains and documents."""
    tokens, labels, positions, segments = np.frombuffer(body, "<i4").reshape(4, *shape)
    counts, nothing = labels >= 0, np.zeros(shape, np.int32)
    return Batch(tokens, np.where(counts, labels, ~labels), segments, positions, counts.astype(np.float32), nothing,
                 nothing > 0, nothing)  # fmt: skip


# --- The student's side


class _Question(NamedTuple):
    number: int
    shape: tuple[int, ...]
    found: Pieces
    body: bytes


class Stream:
    """A `TargetSource` whose teacher runs in another program, at HOST:PORT."""

    def __init__(self, address: str, tokenizer: str, vocab_size: int, chunk: int, *, patience: float | None = None,
                 silence: float = SILENCE, say: Callable[[str], object] = print):  # fmt: skip
        """Waits for the teacher, `patience` seconds (by default PATIENCE) at most, and so whenever it is gone later.

        `chunk`: that which rows are packed for. ConnectionError where no teacher comes; ValueError, naming both
        sides, for one of another tokenizer, vocabulary, chunk or version of the format.
        """
        self._host, self._port = place(address)
        self.address = address
        self._patience, self._silence, self._say = PATIENCE if patience is None else patience, silence, say
        self._needs = facts(tokenizer, vocab_size, chunk)
        self._asked: deque[_Question] = deque()  # all without an answer, of which the first `_sent` are sent
        self._sent = self._numbers = 0
        self._window = 1
        self._transport: Transport | None = None
        self._alone = 0.0  # seconds without a teacher since the last answer, or since it was there first
        self._tries = 0  # since then
        self._identity: Identity | None = None
        self._reconnect()
        self._alone, self._tries = 0.0, 0

    @property
    def identity(self) -> Identity:
        """Whose targets they are; the step is that of those which were looked up last."""
        assert self._identity
        return self._identity

    @property
    def ahead(self) -> int:
        """Batches to ask for before they are looked up."""
        return AHEAD

    def ask(self, batch: Batch) -> None:
        """Have the targets of a batch made. At most `ahead` are asked for and not looked up: ValueError beyond."""
        if len(self._asked) >= AHEAD:
            raise ValueError(f"{AHEAD} batches are asked for already, and none of them is looked up")
        question = _Question(self._numbers, np.shape(batch.tokens), pieces(batch), pack_rows(batch))
        self._numbers += 1
        self._asked.append(question)
        if self._transport:
            with self._losing():
                self._send()

    def look_up(self, batch: Batch) -> SparseTargets:
        """The targets of this process's rows, numpy arrays [B, T, K] and [B, T], present in all but padding.

        Of batches that were asked for before this one, the answers are dropped. ConnectionError when the teacher has
        been gone for longer than `patience`, ValueError when it sends what is not of these rows.
        """
        keys = pieces(batch).keys
        if not any(question.found.keys == keys for question in self._asked):
            while len(self._asked) >= AHEAD:
                self._receive()
            self.ask(batch)
        while True:
            question, body = self._receive()
            if question.found.keys == keys:
                return self._decode(question, body)

    def close(self) -> None:
        if self._transport:
            self._transport.close()
            self._transport = None

    def _receive(self) -> tuple[_Question, bytearray]:
        """The oldest question, and its answer."""
        while True:
            if self._transport is None:
                self._reconnect()
            assert self._transport
            with self._losing():
                self._send()
                expected = _answer_bytes(self.identity.form, self._asked[0].found)
                header, body = self._frame(self._transport, expected)
                if header.get("what") == "refused":
                    raise ValueError(f"the teacher at {self.address} refuses: {header.get('why')}")
                if header.get("what") != "answer":
                    continue
                if header.get("number") != self._asked[0].number:
                    raise ValueError(f"the teacher at {self.address} answers {header.get('number')} where "
                                     f"{self._asked[0].number} was asked for")  # fmt: skip
                self._alone, self._tries, self._sent = 0.0, 0, self._sent - 1
                self._identity = replace(self.identity, teacher_step=header["teacher_step"])
                return self._asked.popleft(), body

    def _send(self) -> None:
        """As many questions as the teacher holds."""
        assert self._transport
        while self._sent < min(self._window, len(self._asked)):
            question = self._asked[self._sent]
            self._transport.send(dict(what="ask", number=question.number, shape=question.shape), question.body)
            self._sent += 1

    def _frame(self, transport: Transport, limit: int) -> tuple[dict[str, Any], bytearray]:
        try:
            return transport.receive(limit)
        except ValueError as error:
            raise ValueError(f"{self.address}: {error}") from None

    def _decode(self, question: _Question, body: bytearray) -> SparseTargets:
        form, found, at, parts = self.identity.form, question.found, 0, []
        for key, tokens in zip(found.keys, (found.stops - found.starts).tolist(), strict=True):
            size = HEADER_BYTES + tokens * form.token.itemsize
            try:
                parts.append(record_format.payload(form, key, tokens, bytes(body[at : at + size])))
            except ValueError as error:
                raise ValueError(f"the teacher at {self.address}, answer {question.number}: {error}") from None
            at += size
        return unpacked(form, question.shape, found, parts)

    # --- Gone, and back

    def _losing(self) -> _Losing:
        """Within it, what says that the teacher is gone ends the connection, not the run."""
        return _Losing(self)

    def _reconnect(self) -> None:
        """Until there is a connection; ConnectionError when the patience is at its end."""
        first, longest = _PAUSES
        since, why = time.monotonic(), "it was lost again and again"
        while True:
            if self._tries and self._alone >= self._patience:
                raise ConnectionError(f"no teacher at {self.address} for {self._alone:.0f} s, in {self._tries} "
                                      f"attempts: {why}")  # fmt: skip
            pause = min(first * 2 ** (self._tries - 1), longest) if self._tries else 0.0
            time.sleep(max(0.0, min(pause, self._patience - self._alone)))
            self._tries += 1
            try:
                self._transport = self._connect()
                self._alone += time.monotonic() - since
                return
            except OSError as error:
                why = str(error) or type(error).__name__
                if self._tries == 1:
                    self._say(f"no answer from the teacher at {self.address} ({why}); trying for {self._patience:g} s")
            self._alone, since = self._alone + time.monotonic() - since, time.monotonic()

    def _connect(self) -> Transport:
        # Not for longer than the patience, and not for nothing at its end.
        left = min(self._silence, max(self._patience - self._alone, 1.0))
        transport = Socket(socket.create_connection((self._host, self._port), timeout=left), left)
        try:
            transport.send(dict(what="hello", protocol=PROTOCOL, facts=self._needs))
            header, _ = self._frame(transport, 0)
            if header.get("what") == "refused":
                raise ValueError(f"the teacher at {self.address} refuses: {header.get('why')}")
            if header.get("what") != "welcome":
                raise ValueError(f"what listens at {self.address} is not llama4 targets serve")
            if line := disagreement(self._needs, header["facts"]):
                raise ValueError(f"{self.address}: {line}")
            self._window, self._sent = max(1, int(header["window"])), 0
            identity = Identity.from_json(header["identity"], f"the teacher at {self.address}")
            transport.expect_signs(self._silence)
        except BaseException:
            transport.close()
            raise
        if self._identity is None:
            self._identity = identity
        # It may be started again, but another one would make this another run.
        self._needs = facts(identity.tokenizer, identity.vocab_size, self._needs["chunk"], identity.form,
                            identity.teacher)  # fmt: skip
        return transport


class _Losing:
    def __init__(self, stream: Stream):
        self._stream = stream

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, OSError):
            return False
        self._stream.close()
        if isinstance(error, TimeoutError):
            self._stream._alone += self._stream._silence
        self._stream._say(f"lost the teacher at {self._stream.address}: {error or type(error).__name__}")
        return True


def _answer_bytes(form: Form, found: Pieces) -> int:
    return int(len(found.keys) * HEADER_BYTES + (found.stops - found.starts).sum() * form.token.itemsize)
