"""A teacher in a program of its own: its targets are the store's, and what becomes of a peer that differs, is slow, or
dies."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support import kill, running

from data.batch import Batch
from data.packing import Document, build_batch, cut, pack
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import stream
from training.serve import Server, bind
from training.stream import ASKED_BYTES, Socket, Stream, pack_rows, unpack_rows
from training.target_record import HEADER_BYTES, Form, encode
from training.target_sources import open_source, read_ahead
from training.targets import Identity, Reader, Writer, pieces, unpacked

ROOT = Path(__file__).resolve().parent.parent.parent
V, CHUNK, T, B = 1000, 64, 128, 2
FORM = Form("stratified", 4, 2)
IDENTITY = Identity("abc", V, "deed", 7, FORM, "run:teacher")


def quiet(_: str) -> None:
    """No lines."""


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Batches of B rows [T], of documents that fill them up to some padding."""
    rng = np.random.default_rng(seed)
    texts = {(0, i): Document(rng.integers(0, V, n).astype(np.int32), 0, i, True)
             for i, n in enumerate(rng.integers(2, 3 * CHUNK, count * B * 4 + 8))}  # fmt: skip
    spans = [span for key, text in texts.items() for span in cut(key, text, T)]
    rows = [(row, texts) for row in pack(spans, T, CHUNK)]
    assert len(rows) >= count * B
    return [build_batch(rows[i : i + B], T, 0) for i in range(0, count * B, B)]


def targets_of(batch: Batch) -> SparseTargets:
    """What depends on a token and its position, as `FORM` has it."""
    rng = np.random.default_rng(1)
    p = np.sort(rng.dirichlet(np.ones(40), 997), axis=1)[:, ::-1]
    ids = rng.integers(0, V, (997, FORM.entries)).astype(np.int32)
    rest = p[:, FORM.top :].sum(axis=1, keepdims=True) / FORM.draws
    mass = np.concatenate([p[:, : FORM.top], np.repeat(rest, FORM.draws, axis=1)], axis=1).astype(np.float32)
    lse, entropy, label = rng.normal(5, 1, (3, 997)).astype(np.float32)
    table = SparseTargets(ids, mass, np.zeros(997, np.float32), lse, entropy, -np.abs(label), np.ones(997, bool))
    place = (batch.tokens * 31 + batch.positions) % 997
    return SparseTargets._make(x[place] for x in table)


class Teacher:
    """Counts its batches, and works only while it may."""

    def __init__(self):
        self.seen, self.done, self.may = 0, 0, threading.Event()
        self.may.set()

    def __call__(self, batch: Batch) -> Callable[[], SparseTargets]:
        self.seen += 1

        def targets() -> SparseTargets:
            assert self.may.wait(30)
            self.done += 1
            return targets_of(batch)

        return targets


@contextmanager
def serving(port: int = 0, identity: Identity = IDENTITY, teacher: Teacher | None = None, **kwargs) -> Iterator[Server]:
    """A server in a thread; it ends as after a signal, or was killed before."""
    server = Server(teacher or Teacher(), identity, CHUNK, bind("127.0.0.1", port), log=quiet, **kwargs)
    with running(server):
        yield server


def port_of(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


def student(address: str, **changes) -> Stream:
    return Stream(address, **dict(tokenizer="abc", vocab_size=V, chunk=CHUNK, patience=10.0, say=quiet) | changes)


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_equal(a: SparseTargets, b: SparseTargets) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_question_holds_what_targets_depend_on():
    (batch,) = batches(1)
    body = pack_rows(batch)
    assert len(body) == ASKED_BYTES * B * T
    back = unpack_rows((B, T), body)
    for name in ("tokens", "labels", "positions", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(getattr(back, name), getattr(batch, name))
        assert getattr(back, name).dtype == getattr(batch, name).dtype
    assert pieces(back).keys == pieces(batch).keys
    without = batch._replace(labels=np.where(batch.loss_mask > 0, batch.labels, -1))  # a pad id may be negative
    assert pieces(unpack_rows((B, T), pack_rows(without))).keys == pieces(batch).keys


def test_the_targets_are_the_stores(tmp_path: Path):
    """Bit for bit, asked for ahead or not, and some answers left."""
    asked = batches(6)
    with Writer(tmp_path, IDENTITY) as writer:
        for batch in asked:
            writer.add(pieces(batch), targets_of(batch))
    with (
        serving() as server,
        closing(open_source(f"stream:{server.address}", "abc", V, CHUNK, quiet)) as source,
        Reader(tmp_path) as store,
    ):
        assert source.identity == store.identity and source.ahead == 4 and store.ahead == 0
        for batch in asked[:4]:
            source.ask(batch)
        with pytest.raises(ValueError, match="4 batches are asked for already"):
            source.ask(asked[4])
        for batch in (asked[0], asked[2], asked[4], asked[5]):
            assert_equal(source.look_up(batch), store.look_up(batch))
        padding = asked[0]._replace(segment_ids=np.zeros((B, T), np.int32))
        assert not source.look_up(padding).present.any()


class Drawn:
    """Batches, as a loader has them."""

    def __init__(self, given: list[Batch]):
        self.given, self.drawn, self.closed = given, 0, False

    def __next__(self) -> Batch:
        self.drawn += 1
        return self.given[self.drawn - 1]

    def get_state(self) -> dict:
        return dict(drawn=self.drawn)

    def close(self) -> None:
        self.closed = True


class Asked:
    """A source that notes what it is asked for."""

    def __init__(self, ahead: int):
        self.identity, self.ahead, self.asked, self.look_up = IDENTITY, ahead, [], targets_of

    def ask(self, batch: Batch) -> None:
        self.asked.append(batch)

    def close(self) -> None: ...


def test_reading_ahead_keeps_the_place_of_what_was_used():
    given = batches(7)
    drawn, source = Drawn(given), Asked(3)
    ahead = read_ahead(drawn, [source, Asked(0)], steps=5)
    assert ahead.get_state() == dict(drawn=0)
    for step in range(1, 6):
        assert next(ahead) is given[step - 1] and ahead.get_state() == dict(drawn=step)
        assert source.asked == given[: min(step + 2, 5)] and drawn.drawn == len(source.asked)
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()
    assert drawn.closed
    assert read_ahead(drawn, [Asked(0)], steps=5) is drawn and read_ahead(drawn, [], steps=5) is drawn


@pytest.mark.parametrize(
    "needs, line",
    [
        (dict(tokenizer="xyz"), "the teacher has tokenizer abc, but the student tokenizer xyz"),
        (dict(vocab_size=V + 1), "the teacher has a vocabulary of 1000, but the student a vocabulary of 1001"),
        (dict(chunk=32), "the teacher has rows packed in chunks of 64, but the student rows packed in chunks of 32"),
    ],
)
def test_who_differs_is_refused_in_a_line_that_names_both(needs, line):
    with serving() as server:
        with pytest.raises(ValueError, match=f"{re.escape(server.address)} refuses: {line}$"):
            student(server.address, **needs)
        student(server.address).close()  # the server goes on


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    with serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr(stream.record_format, "VERSION", 2)
            with pytest.raises(ValueError, match="has targets of version 1, but the student targets of version 2"):
                student(server.address)
        monkeypatch.setattr(stream, "PROTOCOL", 9)
        with pytest.raises(ValueError, match="has version 1 of the protocol, but the student version 9"):
            student(server.address)


def test_killed_and_started_again():
    """With batches on their way: what has no answer is asked for again."""
    asked, lines, held = batches(6), [], Teacher()
    with serving(teacher=held) as first:
        port, source = port_of(first), student(first.address, say=lines.append)
        for batch in asked[:4]:
            source.ask(batch)
        assert_equal(source.look_up(asked[0]), as_stored(asked[0]))
        wait_for(lambda: held.done == 4)
        held.may.clear()
        source.ask(asked[4])
        wait_for(lambda: held.seen == 5)
        kill(first)
        held.may.set()
    with closing(source), serving(port):
        for batch in asked[1:]:
            assert_equal(source.look_up(batch), as_stored(batch))
    assert any(line.startswith("lost the teacher at") for line in lines)


def as_stored(batch: Batch) -> SparseTargets:
    """What a record of them says."""
    found, flat = pieces(batch), [x.reshape(-1, *x.shape[2:]) for x in targets_of(batch)]
    payloads = [
        memoryview(encode(FORM, key, SparseTargets._make(x[a:b] for x in flat)))[HEADER_BYTES:]
        for key, a, b in zip(found.keys, found.starts, found.stops, strict=True)
    ]
    return unpacked(FORM, np.shape(batch.tokens), found, payloads)


def test_another_teacher_at_its_place_is_refused():
    (batch,) = batches(1)
    with serving() as first:
        port, source = port_of(first), student(first.address)
        kill(first)
    refused = pytest.raises(ValueError, match="the teacher has teacher dead, but the student teacher deed")
    with closing(source), serving(port, replace(IDENTITY, teacher="dead")), refused:
        source.look_up(batch)


def test_a_teacher_that_stays_away_ends_the_run_in_time():
    (batch,) = batches(1)
    with serving() as server:
        address, source = server.address, student(server.address, patience=1.0)
        kill(server)
    began = time.monotonic()
    gone = rf"no teacher at {re.escape(address)} for \d+ s, in \d+ attempts: .*refused"
    with closing(source), pytest.raises(ConnectionError, match=gone):
        source.look_up(batch)
    with pytest.raises(ConnectionError, match=gone):
        student(address, patience=1.0)
    assert 1.5 < time.monotonic() - began < 60


def test_a_teacher_that_hangs_counts_as_gone():
    """It accepts, and says nothing: before the greeting, and after it."""
    (batch,) = batches(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"for \d+ s, in 1 attempts: timed out"):
            student(address, patience=1.0)
    held = Teacher()
    held.may.clear()
    with serving(teacher=held) as server:
        source = student(server.address, patience=0.5, silence=0.3)
        with closing(source), pytest.raises(ConnectionError, match=r"for \d s, in \d attempts: it was lost again"):
            source.look_up(batch)
        held.may.set()


def test_a_busy_teacher_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.serve.SECONDS", 0.1)
    (batch,), held = batches(1), Teacher()
    held.may.clear()
    with serving(teacher=held) as server, closing(student(server.address, silence=0.5, patience=0.1)) as source:
        threading.Timer(1.5, held.may.set).start()
        assert_equal(source.look_up(batch), as_stored(batch))
        assert source._tries == 0 and held.seen == 1


def test_who_never_reads_fills_its_own_places(monkeypatch: pytest.MonkeyPatch):
    """Its questions stay in the system's buffers; the others are answered."""
    monkeypatch.setattr("training.serve.SECONDS", 0.1)
    large = jax.tree.map(lambda x: np.tile(x, (500, 1)), batches(1)[0])  # 2 MB a question, 3 an answer
    (small,) = batches(1, seed=1)
    with serving(window=3) as server:
        deaf = Socket(socket.create_connection(("127.0.0.1", port_of(server))), 1.0)
        deaf.send(dict(what="hello", protocol=1, facts=stream.facts("abc", V, CHUNK)))
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 100:
                deaf.send(dict(what="ask", number=sent, shape=(500 * B, T)), pack_rows(large))
                sent += 1
        (client,) = server.clients
        assert client.held <= 3 and client.answers.qsize() + server.jobs.qsize() <= 3
        with closing(student(server.address)) as source:
            assert_equal(source.look_up(small), as_stored(small))
        assert client.held <= 3 and len(server._kept) == 2  # equal questions were computed once
        deaf.close()
        wait_for(lambda: not server.clients)


def test_rows_of_two_students_are_computed_once():
    asked, teacher = batches(4), Teacher()
    with serving(teacher=teacher) as server:
        with closing(student(server.address)) as one, closing(student(server.address)) as two:
            for batch in asked:
                one.ask(batch)
                two.ask(batch._replace(domain=batch.domain + 1))
            for batch in asked:
                assert_equal(one.look_up(batch), two.look_up(batch))
        assert teacher.seen == 4 and server.answered == 2 * server.computed


def test_only_so_much_is_kept():
    asked, teacher = batches(3), Teacher()
    with serving(teacher=teacher, kept_bytes=1) as server, closing(student(server.address)) as source:
        for batch in (*asked, asked[2], asked[0]):
            source.look_up(batch)
        assert teacher.seen == 4 and len(server._kept) == 1  # the last one is


def test_what_is_no_question_is_refused_and_the_others_go_on():
    (batch,), facts = batches(1), stream.facts("abc", V, CHUNK)
    hello = dict(what="hello", protocol=1, facts=facts)
    wrong = batch._replace(tokens=batch.tokens + V)

    def refusal(*frames: tuple[dict, bytes] | bytes) -> str:
        connected = socket.create_connection(("127.0.0.1", port_of(server)))
        transport = Socket(connected, 10.0)
        with closing(transport):
            for frame in frames:
                connected.sendall(frame) if isinstance(frame, bytes) else transport.send(*frame)
            while (header := transport.receive(10**6)[0])["what"] == "welcome":
                pass
            assert header["what"] == "refused"
            return header["why"]

    with serving(columns=2) as server, closing(student(server.address)) as source:
        assert "no message of llama4 targets" in refusal(b"GET / HTTP/1.1\r\n\r\n")
        assert "no question (KeyError('facts'))" in refusal((dict(what="hello", protocol=1), b""))
        huge = stream._PREFIX.pack(b"L4TS", 2, 2**60)  # nothing of that size is made
        assert re.match(rf"a message of {2**60:,} bytes came where .* are the most", refusal((hello, b""), huge))
        short = (dict(what="ask", number=0, shape=(B, T)), pack_rows(batch)[:-4])
        assert "are no 2 rows of 128 tokens" in refusal((hello, b""), short)
        odd = (dict(what="ask", number=0, shape=(B * T, 1)), pack_rows(batch))
        assert "do not divide over the teacher's mesh.context (2)" in refusal((hello, b""), odd)
        assert "not of a vocabulary of 1000" in refusal(
            (hello, b""), (dict(what="ask", number=0, shape=(B, T)), pack_rows(wrong))
        )
        with pytest.raises(ValueError, match=f"teacher at {server.address} refuses: ids of [0-9]+ to "):
            source.look_up(wrong._replace(tokens=np.where(batch.positions > 3, wrong.tokens, batch.tokens)))
        with closing(student(server.address)) as other:
            assert other.look_up(batch).present.any()


def test_an_answer_of_other_rows_is_refused(monkeypatch: pytest.MonkeyPatch):
    one, two = batches(2)
    two = two._replace(segment_ids=one.segment_ids, positions=one.positions)  # as many bytes

    class Wrong(Server):
        def _encode(self, job, targets):
            return super()._encode(job._replace(found=pieces(two)), targets)

    server = Wrong(Teacher(), IDENTITY, CHUNK, bind("127.0.0.1", 0), log=quiet)
    refused = pytest.raises(ValueError, match=r"answer 0: .*")
    with running(server), closing(student(server.address)) as source, refused:
        source.look_up(one)


def test_an_address_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="cannot listen on"):
        bind("127.0.0.1", taken.getsockname()[1])
