"""Stored targets: what a record keeps, that pieces are found however they are packed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.batch import Batch, padding
from data.packing import Document, build_batch, cut, pack
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import target_record, targets
from training.target_record import Form
from training.targets import Identity, Reader, Writer, pieces

VOCAB = 202_048
TOP, SAMPLE, STRATIFIED = Form("topk", 64, 0), Form("sample", 0, 12), Form("stratified", 32, 16)
FORMS = [TOP, SAMPLE, STRATIFIED, Form("stratified", 1, 3), Form("topk", 1, 0), Form("topk", 2, 0)]
CHUNK = 64


def identity(form: Form = STRATIFIED, **changes) -> Identity:
    return Identity(**dict(tokenizer="abc", vocab_size=VOCAB, teacher="deed", teacher_step=7, form=form) | changes)


def distribution(rng: np.random.Generator, n: int, form: Form) -> SparseTargets:
    """As `sparsify` makes them, from Zipf's law to one near certainty."""
    ids = rng.integers(0, VOCAB, (n, form.entries)).astype(np.int32)
    power = rng.uniform(0.5, 3, (n, 1))
    p = np.arange(1.0, 300) ** -power
    p /= p.sum(axis=1, keepdims=True)
    mass, tail = np.zeros((n, form.entries), np.float32), np.zeros(n, np.float32)
    rest = p[:, form.top :].sum(axis=1)
    if form.kind == "sample":
        mass[:, 1:] = 1 / form.draws
    else:
        mass[:, : form.top] = p[:, : form.top]
    if form.kind == "topk":
        tail = rest.astype(np.float32)
    elif form.kind == "stratified":
        mass[:, form.top :] = rest[:, None] / form.draws
    lse, entropy, label = (rng.normal(10, 3, n).astype(np.float32) for _ in range(3))
    return SparseTargets(ids, mass, tail, lse, entropy, -np.abs(label), np.ones(n, bool))


def there_and_back(form: Form, given: SparseTargets, key: bytes = bytes(16)) -> SparseTargets:
    record = target_record.encode(form, key, given)
    body = target_record.payload(form, key, len(given.lse), record)
    return target_record.decode(form, bytes(body))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_record_there_and_back(form):
    given = distribution(np.random.default_rng(0), 300, form)
    if form.kind == "stratified":  # nothing was left to draw from
        given.ids[5, form.top :], given.mass[5, form.top :] = -1, 0
    got = there_and_back(form, given)
    assert np.array_equal(got.ids, given.ids) and got.ids.dtype == np.int32 and got.present.all()
    for name in ("lse", "entropy", "label_logp"):
        np.testing.assert_allclose(getattr(got, name), getattr(given, name), rtol=2**-11)
    if form.kind == "sample":
        assert np.array_equal(got.mass, given.mass)
        return
    top = np.arange(form.entries) < form.top
    np.testing.assert_allclose(got.tail, given.tail, rtol=1e-6)
    np.testing.assert_allclose(got.mass[:, ~top], given.mass[:, ~top], rtol=1e-5)
    whole = (np.arange(300) != 5) | (form.kind == "topk")
    np.testing.assert_allclose((got.mass.sum(-1) + got.tail)[whole], 1, atol=1e-6)
    error = np.abs(got.mass - given.mass)[:, 1 : form.top]
    span = np.log(given.mass[:, min(form.top - 1, 1), None] / given.mass[:, form.top - 1 : form.top]) + 1 / 16 + 2**-7
    assert np.all(error <= np.expm1(span / 254) * given.mass[:, 1 : form.top] * 1.001)
    if form.top > 1:
        rms = np.sqrt(np.mean((error / given.mass[:, 1 : form.top]) ** 2))
        assert rms <= np.max(span) / 254 / np.sqrt(6)
    np.testing.assert_array_less(np.abs(got.mass - given.mass)[whole, 0], error.sum(axis=1)[whole] + 2e-6)


def test_rounding_is_unbiased():
    """Over many contents, and down to masses below the codes' range."""
    repeats = 4000
    mass = np.array([0.4, 0.05, 0.011, 3e-4, 1e-7, 3e-9])
    high, span, codes = target_record.to_codes(np.repeat(mass[None], repeats, axis=0), bytes(range(16)))
    got = target_record.from_codes(high, span, codes).astype(np.float64)
    error = got.std(axis=0) / np.sqrt(repeats)
    assert np.all(np.abs(got.mean(axis=0) - mass) < 4.5 * error + 1e-6 * mass)
    assert len(np.unique(got[:, 1])) == 2 and span[0] == 255  # neighbours, of the widest range
    other = target_record.to_codes(np.repeat(mass[None], repeats, axis=0), bytes(range(1, 17)))[2]
    assert np.any(codes != other)  # another content, other chances


@pytest.mark.parametrize("form, most", [(TOP, 220), (STRATIFIED, 152), (SAMPLE, 36)], ids=str)
def test_bytes_a_token(form, most):
    record = target_record.encode(form, bytes(16), distribution(np.random.default_rng(0), 500, form))
    assert form.token.itemsize == most and len(record) == 500 * most + target_record.HEADER_BYTES
    assert target_record.HEADER_BYTES <= 36


@pytest.mark.parametrize("count", [1, 3, 4, 13, 48])
def test_eighteen_bits(count):
    ids = np.random.default_rng(0).integers(0, 2**18, (50, count))
    ids[0], ids[1] = 2**18 - 1, 0
    packed = target_record.pack(ids)
    assert packed.shape == (50, -(-18 * count // 8)) and np.array_equal(target_record.unpack(packed, count), ids)
    bits = np.unpackbits(packed[7], bitorder="little")[: 18 * count].reshape(count, 18)
    assert np.array_equal(bits @ (1 << np.arange(18)), ids[7])  # the layout that the docstring gives


# --- The store


def documents(rng: np.random.Generator, count: int = 40) -> list[Document]:
    lengths = rng.integers(2, 3 * CHUNK, count)
    return [Document(rng.integers(0, VOCAB, n).astype(np.int32), 0, i, True) for i, n in enumerate(lengths)]


def packed(texts: list[Document], seq_len: int, rows: int) -> list[Batch]:
    by_key = {(0, n): text for n, text in enumerate(texts)}
    spans = [span for key, text in by_key.items() for span in cut(key, text, seq_len)]
    built = [(row, by_key) for row in pack(spans, seq_len, CHUNK)]
    built += [([], {})] * (-len(built) % rows)
    return [build_batch(built[i : i + rows], seq_len, 0) for i in range(0, len(built), rows)]


def of_content(batch: Batch, form: Form) -> SparseTargets:
    """Targets that depend on a token's document and place, as a teacher's do."""
    table = distribution(np.random.default_rng(0), 997, form)
    place = (batch.tokens * 31 + batch.positions) % 997
    return SparseTargets(*(x[place] for x in table))


def by_token(batches: list[Batch], found: list[SparseTargets]) -> dict[tuple[int, int], bytes]:
    """(document, position) -> everything said of it, for the tokens that have a target."""
    out = {}
    for batch, t in zip(batches, found, strict=True):
        for row, at in zip(*np.nonzero(t.present), strict=True):
            where = int(batch.document_id[row, at]), int(batch.positions[row, at])
            out[where] = b"".join(np.asarray(field[row, at]).tobytes() for field in t)
    return out


SMALL = Form("stratified", 3, 2)


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, list[Document], list[Batch]]:
    """Targets of forty documents, written from rows of 256 in batches of 4, in shards of a few records."""
    texts = documents(np.random.default_rng(1))
    batches = packed(texts, 256, 4)
    with Writer(tmp_path / "store", identity(SMALL), shard_bytes=20_000) as writer:
        for batch in batches:
            writer.add(pieces(batch), of_content(batch, SMALL))
    assert writer.written["pieces"] == len(texts) and writer.written["tokens"] == sum(len(t.tokens) for t in texts)
    return tmp_path / "store", texts, batches


def test_the_same_targets_however_packed(store):
    """Other lengths of rows, sizes of batches, order; several readers; some documents that nobody wrote."""
    folder, texts, batches = store
    with Reader(folder, tokenizer="abc", vocab_size=VOCAB, teacher="deed") as reader:
        assert reader.counts()["shards"] > 2 and reader.counts()["pieces"] == len(texts)
        looked_up = [reader.look_up(batch) for batch in batches]
        want = by_token(batches, looked_up)
        assert len(want) == sum(len(text.tokens) for text in texts)
        for batch, t in zip(batches, looked_up, strict=True):
            assert np.array_equal(t.present, batch.segment_ids > 0)
            given = of_content(batch, SMALL)
            assert np.array_equal(t.ids[t.present], given.ids[t.present])
            assert not np.any(t.mass[~t.present]) and np.all(t.ids[~t.present] == -1)
        order = np.random.default_rng(2).permutation(len(texts))
        strangers = documents(np.random.default_rng(3), 5)
        for seq_len, rows in [(192, 1), (512, 3)]:
            mixed = [texts[i] for i in order] + [s._replace(document_id=1000 + i) for i, s in enumerate(strangers)]
            others = packed(mixed, seq_len, rows)
            assert by_token(others, [reader.look_up(batch) for batch in others]) == want
        # Rows too short for some: these are cut elsewhere, and their pieces are others.
        short = packed(texts, CHUNK, 4)
        some = by_token(short, [reader.look_up(batch) for batch in short])
        assert some.items() <= want.items()
        assert {d for d, _ in some} == {d for d, text in enumerate(texts) if len(text.tokens) <= CHUNK}


def test_a_piece_is_its_tokens_its_place_and_its_last_label():
    a = packed(documents(np.random.default_rng(1), 1), 256, 1)[0]
    key = pieces(a).keys
    last = int(np.flatnonzero(a.segment_ids[0])[-1])
    for change in ("tokens", "positions", "loss_mask"):
        changed = np.array(getattr(a, change))
        changed[0, {"tokens": 1, "positions": slice(0, last + 1), "loss_mask": last}[change]] += 1
        assert pieces(a._replace(**{change: changed})).keys != key, change
    changed = a.labels.copy()
    changed[0, last] += 1  # which does not count: the document ends there
    assert pieces(a._replace(labels=changed, domain=a.domain + 1)).keys == key
    empty = packed([], 256, 1) or [padding(1, 256, 0)]
    assert pieces(empty[0]).keys == []


def test_killed_and_started_again(store, tmp_path: Path):
    """Whatever had no manifest is written again, the rest is kept; a third start has nothing to do."""
    folder, _, batches = store
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifests = sorted(folder.glob("*.json"))
    last = json.loads(manifests[-1].read_text())
    manifests[-1].unlink()
    manifests[-1].with_suffix(".array_record").write_bytes(b"half of a sha")

    def write(**changes) -> dict[str, int]:
        with Writer(folder, identity(SMALL), **changes) as writer:
            for batch in batches:
                writer.add(pieces(batch), of_content(batch, SMALL))
            assert not any(writer.missing(pieces(batch)).any() for batch in batches)
        return writer.written

    assert write(shard_bytes=20_000)["pieces"] == last["pieces"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert write()["pieces"] == 0 and {path.name for path in folder.iterdir()} == before.keys()
    # Another process has shards of its own names, and sees what is there.
    assert write(process=3)["pieces"] == 0
    for name in before:
        (folder / name).unlink()
    assert write(process=3)["pieces"] == len(store[1])
    assert {path.stem for path in folder.iterdir()} == {"00003-00000"}


def test_interrupted_it_completes_the_shard(tmp_path: Path):
    (batch, *_) = packed(documents(np.random.default_rng(1)), 256, 4)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, identity(SMALL)) as writer:
        writer.add(pieces(batch), of_content(batch, SMALL))
        raise KeyboardInterrupt
    with Reader(tmp_path) as reader:
        assert reader.counts()["pieces"] == len(pieces(batch).keys)


def test_corruption_is_refused(store):
    """One byte of a record, whether the file's own checksum sees it or ours; and a record of another piece."""
    folder, _, batches = store
    shard = sorted(folder.glob("*.array_record"))[0]
    whole = shard.read_bytes()
    at = whole.index(target_record.MAGIC) + target_record.HEADER_BYTES + 5
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with Reader(folder) as reader, pytest.raises(ValueError, match=rf"{shard.name}, record \d+: "):
        for batch in batches:
            reader.look_up(batch)
    shard.write_bytes(whole)
    index = shard.with_suffix(".npy")
    high, low, record = np.load(index)
    np.save(index, np.stack([high, low, np.roll(record, 1)]))
    with pytest.raises(ValueError, match=f"{index.name} is not what was written"):
        Reader(folder)
    facts = json.loads((manifest := shard.with_suffix(".json")).read_text())
    manifest.write_text(json.dumps({name: fact for name, fact in facts.items() if name != "index"}))  # as one of before
    with Reader(folder) as reader, pytest.raises(ValueError, match=rf"{shard.name}, record \d+: it holds .* of hash"):
        for batch in batches:
            reader.look_up(batch)


def test_our_own_checksum():
    form = SAMPLE
    record = bytearray(target_record.encode(form, bytes(16), distribution(np.random.default_rng(0), 9, form)))
    target_record.payload(form, bytes(16), 9, bytes(record))
    with pytest.raises(ValueError, match="not of the form topk, top 64"):
        target_record.payload(TOP, bytes(16), 9, bytes(record))
    with pytest.raises(ValueError, match="no record"):
        target_record.payload(form, bytes(16), 9, b"")
    for at in (9, 20, target_record.HEADER_BYTES, len(record) - 1):
        record[at] ^= 4
        with pytest.raises(ValueError, match="corrupted"):
            target_record.payload(form, bytes(16), 9, bytes(record))
        record[at] ^= 4


@pytest.mark.parametrize(
    "expected, complaint",
    [
        (dict(tokenizer="xyz"), "holds targets of tokenizer abc, but this run has xyz"),
        (dict(vocab_size=4096), "holds targets of a vocabulary of 202048, but this run has 4096"),
        (dict(teacher="dead"), "holds targets of teacher deed, but this run has dead"),
    ],
)
def test_what_does_not_fit_is_refused(store, expected, complaint):
    folder, _, _ = store
    with pytest.raises(ValueError, match=complaint) as caught:
        Reader(folder, **expected)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=complaint.replace("this run", "what is to be written")):
        Writer(folder, identity(SMALL, **expected))


def test_shards_of_one_store_agree(store, tmp_path: Path):
    folder, texts, batches = store
    with pytest.raises(ValueError, match=r"holds targets of top 3, but what is to be written has 32"):
        Writer(folder, identity(STRATIFIED))
    other = tmp_path / "other"
    with Writer(other, identity(SMALL, teacher_step=8)) as writer:
        writer.add(pieces(batches[0]), of_content(batches[0], SMALL))
    with pytest.raises(ValueError, match=r"teacher's step 8, but .* has 7"):
        Reader([folder, other])
    shards = sorted(folder.glob("*.json"))
    with Reader(shards[:2]) as two, Reader(folder) as all_of_them:
        assert 0 < two.counts()["pieces"] < all_of_them.counts()["pieces"] == len(texts)
        assert two.look_up(batches[0]).present.any() and not two.look_up(batches[-1]).present.all()
    with pytest.raises(FileNotFoundError, match="no complete shard"):
        Reader(tmp_path / "nothing")
    manifest = json.loads(shards[0].read_text())
    shards[0].write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ValueError, match="is of version 2 of the format, not 1"):
        Reader(folder)
    with pytest.raises(ValueError, match="above 262143"):
        identity(vocab_size=2**18)


def test_through_a_local_copy(store, monkeypatch: pytest.MonkeyPatch):
    """As where the folder is remote: shards are copied before they are read."""
    folder, _, batches = store
    with Reader(folder) as reader:
        want = reader.look_up(batches[0])
    monkeypatch.setattr(targets, "_is_remote", lambda path: True)
    with Reader(folder) as reader:
        for a, b in zip(want, reader.look_up(batches[0]), strict=True):
            assert np.array_equal(a, b)
        assert sorted(Path(reader._scratch.folder).glob("*.array_record"))
