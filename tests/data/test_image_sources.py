"""Documents with images: every source reads them at random, counts what is bad, and packs them whole."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image
from pyarrow import parquet

from data import lanes, sources
from data.batch import ImageShape
from data.config import DataConfig
from data.content import MARK, Illustrated, illustrated, tokenise
from data.contents import Counts, pieces
from data.images import small_picture
from data.loader import Corpus
from data.packing import Document, Piece, Tiles, build_batch, cut, deal, pack, span_from, tiles_of
from data.sources import open_sources
from data.tokenizer import SentencePieceTokenizer, train_bpe

SHAPE = ImageShape(tiles=6, size=16, tokens=4)


def picture(n: int, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_bpe([f"a few words of text, number {n}" for n in range(300)], 320, images=True))


def opened(kind: str, place: object, tmp_path: Path, bad: float = 0.5) -> sources.Source:
    (source,) = open_sources({"pictures": f"{kind}:{place}"}, epath.Path(tmp_path / "cache"), bad)
    return source


def write(folder: Path, kind: str) -> object:
    """Five good documents, number 4 with two images, and a damaged one."""
    texts, damaged = [f"this is number {n}" for n in range(5)], picture(9)[:60]
    images = [[picture(n)] if n < 4 else [picture(4), picture(5)] for n in range(5)]
    texts[4] = f"{MARK} one and {MARK} two"
    if kind == "images":
        for n, text in enumerate(texts[:4]):
            (folder / f"{n}.png").write_bytes(images[n][0])
            (folder / f"{n}.txt").write_text(text)
        (folder / "bad.png").write_bytes(damaged)
        (folder / "sub").mkdir()
        (folder / "sub" / "listed.png").write_bytes(images[4][0])
        (folder / "none.png").write_bytes(images[4][0])  # without a caption
        lines = [dict(file_name="sub/listed.png", text="listed"), dict(file_name="bad.png", text="bad")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder
    if kind == "webdataset":
        with tarfile.open(folder / "0.tar", "w") as tar:

            def add(name: str, content: bytes) -> None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            for n, text in enumerate(texts):
                for i, image in enumerate(images[n]):
                    add(f"a/{n}.{i}.png" if n == 4 else f"a/{n}.png", image)
                add(
                    f"a/{n}.json" if n == 2 else f"a/{n}.txt",
                    json.dumps(dict(caption=text)).encode() if n == 2 else text.encode(),
                )
            add("a/bad.png", damaged)
            add("a/bad.txt", b"bad")
        return folder / "0.tar"
    records = [dict(text=t, images=i) for t, i in zip(texts, images, strict=True)] + [
        dict(text="bad", images=[damaged])
    ]
    if kind == "parquet":
        table = pyarrow.table({
            "caption": [r["text"] for r in records],
            "images": [[dict(bytes=b, path=None) for b in r["images"]] for r in records],
        })  # fmt: skip
        parquet.write_table(table, folder / "0.parquet", row_group_size=4)
        return folder / "0.parquet"
    lines = [json.dumps(r | dict(images=[base64.b64encode(b).decode() for b in r["images"]])) for r in records]
    if kind == "jsonl":
        (folder / "0.jsonl").write_text("\n".join(lines))
        return folder / "0.jsonl"
    writer = ArrayRecordWriter(str(folder / "0.array_record"), "group_size:1")
    for line in lines:
        writer.write(line.encode())
    writer.close()
    return folder / "0.array_record"


@pytest.mark.parametrize("kind", ["images", "webdataset", "parquet", "jsonl", "array_record"])
def test_every_kind_of_source_reads_images(kind, tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    source = opened(kind, write(tmp_path / "in", kind), tmp_path)
    assert len(source) == 5 and source.skipped == (2 if kind == "images" else 1)
    found = [source[i] for i in range(5)]
    assert all(isinstance(text, Illustrated) for text in found)
    shown = {text.replace(MARK, ""): text for text in found}
    assert "this is number 3" in shown
    three = shown["this is number 3"]
    tokens, images = tokenise(three, tokenizer, SHAPE)
    assert images is not None and images.tiles.shape == (1, 16, 16, 3)
    ids = tokenizer.image_ids
    assert ids and tokens[:3].tolist() == [tokenizer.bos_id, ids.start, ids.image]
    assert tokenizer.decode(tokens[images.slots < 0][4:-1]) == "this is number 3"
    if kind != "images":
        assert len(shown[" one and  two"].images) == 2
    again = opened(kind, tmp_path / "in" if kind == "images" else next((tmp_path / "in").iterdir()), tmp_path)
    np.testing.assert_array_equal(again.hashes, source.hashes)
    with pytest.raises(ValueError, match=r"2 of 7|1 of 6"):
        opened(kind, tmp_path / "in" if kind == "images" else next((tmp_path / "in").iterdir()), tmp_path, bad=0.0001)


def test_frames_of_videos(tmp_path):
    av = pytest.importorskip("av", reason="videos need the extra [video]")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "a.txt").write_text("it gets lighter")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:500])
    (tmp_path / "b.txt").write_text("cut short")
    source = opened("video", tmp_path, tmp_path)
    assert len(source) == 1 and source.skipped == 1
    text = source[0]
    assert isinstance(text, Illustrated) and len(text.images) == 16 and text.most == 1
    brightness = [float(np.mean(image)) for image in text.images if isinstance(image, np.ndarray)]
    assert brightness == sorted(brightness) and brightness[0] < 10 and brightness[-1] > 220


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (dict(image=b"x"), "image 1: 1 bytes that are no JPEG"),
        (dict(image="?"), "is no base64"),
        (dict(image=3), "image is int"),
        (dict(images=[]), "0 images, where 1 to 48"),
        (dict(images=[b""] * 49), "49 images"),
        (dict(image=b"x", images=[b"x"]), 'both "image" and "images"'),
        (dict(text=f"{MARK} and {MARK}", image=b"x"), "1 images, where the text has <|image|> 2 times"),
        (dict(image=np.zeros((2, 2, 5), np.uint8)), "is an array"),
    ],
)
def test_records_that_cannot_be_are_named(record, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
        illustrated(record.get("text", "t"), record, check=True)
    assert "\n" not in str(error.value)


def document(n: int, images: int, tokenizer: SentencePieceTokenizer) -> Document:
    pixels = tuple(np.full((16, 16, 3), 10 * n + i, np.uint8) for i in range(images))
    text = Illustrated(f"w {MARK}" * images, pixels) if images else "only words here"
    tokens, found = tokenise(text, tokenizer, SHAPE)
    return Document(tokens, 0, n, True, found)


@pytest.mark.parametrize("dealt", [False, True])
def test_a_batch_has_every_token_of_every_tile(tokenizer, dealt):
    """Packed where tiles find room: each patch token's slot shows its own tile, and no image token is predicted."""
    documents = {(0, n): document(n, n % 5, tokenizer) for n in range(12)}
    spans = [span for key, d in documents.items() for span in cut(key, d, 32, SHAPE)]
    tiles, ids, seen = Tiles(documents, SHAPE), tokenizer.image_ids, 0
    rows = pack(spans, 32, 16, 3, tiles)
    rows = deal(rows, 32, 16, 1, tiles) if dealt else rows
    assert sorted(piece[:3] for row in rows for piece in row) == sorted(spans)
    batch = build_batch([(row, documents) for row in rows], 32, tokenizer.pad_id, SHAPE)
    assert ids and batch.tiles.shape[1:] == (6, 16, 16, 3)
    np.testing.assert_array_equal(batch.slots >= 0, batch.tokens == ids.patch)
    for row, place in zip(*np.nonzero(batch.slots >= 0), strict=True):
        tile, token = divmod(int(batch.slots[row, place]), SHAPE.tokens)
        whole = documents[0, int(batch.document_id[row, place])]
        piece = next(p for p in rows[row] if p.at <= place < p.at + p.stop - p.start)
        assert whole.images is not None
        slot = int(whole.images.slots[piece.start + place - piece.at])
        assert slot % SHAPE.tokens == token
        np.testing.assert_array_equal(batch.tiles[row, tile], whole.images.tiles[slot // SHAPE.tokens])
        seen += 1
    special = np.isin(batch.labels, ids)
    assert not batch.loss_mask[special].any()
    assert batch.loss_mask[(batch.segment_ids > 0) & ~special].sum() > 0
    assert seen == sum(n % 5 for n in range(12)) * SHAPE.tokens


def test_images_have_their_share_of_the_tokens(tmp_path, tokenizer, monkeypatch):
    """Rows full of short documents with images would need more room than they have, and rows with few are less full: of
    neither do images wait, here in windows as long as the run."""
    monkeypatch.setattr(lanes, "OF_A_PASS", 0.05)
    rng = np.random.default_rng(0)
    prose = [dict(text=" ".join(rng.choice(["few", "words", "of", "text"], 400))) for _ in range(60)]
    pictures = [dict(text=f"{MARK} number {n}", image=base64.b64encode(picture(n)).decode()) for n in range(200)]
    for name, records in (("prose", prose), ("pictures", pictures)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("prose", "pictures")}
    cfg = DataConfig(sources=places, heldout=0.1, weights={"pictures": 0.3})
    corpus = Corpus.open(cfg, tmp_path / "cache", lambda _: None, tokenizer, images=(4, 16, 4))
    counts = Counts(corpus.domains, corpus.shares)
    with contextlib.closing(corpus.train(2, 128, 128, seed=0)) as stream:
        for _ in range(100):
            counts.add(next(stream))
    assert counts.tokens[0] / counts.tokens.sum() == pytest.approx(0.3, abs=0.02)


def test_what_a_batch_shows_of_images(tokenizer):
    """Each stands in its place between the words, and its slot is of its own tile."""
    documents = {(0, 0): document(0, 3, tokenizer), (0, 1): document(1, 2, tokenizer)}
    rows = pack([span for key, d in documents.items() for span in cut(key, d, 128, SHAPE)], 128, 128)
    batch = build_batch([(row, documents) for row in rows], 128, tokenizer.pad_id, SHAPE)
    shown = list(pieces(batch, tokenizer, ("pictures",)))
    assert sorted(sum(span.slot >= 0 for span in piece.spans) for piece in shown) == [2, 3]
    for piece in shown:
        assert "".join(span.text for span in piece.spans) == f"w {MARK}" * (3 - piece.document)
        found = [batch.tiles[piece.row, s.slot // SHAPE.tokens, 0, 0, 0] for s in piece.spans if s.slot >= 0]
        assert found == [10 * piece.document + i for i in range(len(found))]
        picture_of = base64.b64decode(small_picture(batch.tiles[piece.row, 0], 8))
        assert Image.open(io.BytesIO(picture_of)).size == (8, 8)


def test_documents_are_cut_where_tiles_have_no_room(tokenizer):
    """In front of the first image that does not fit; within an image only where that alone is too much."""
    whole = document(0, 7, tokenizer)  # an image is one tile
    assert whole.images
    spans = cut((0, 0), whole, 128, SHAPE)
    last = int(whole.images.starts[6])
    assert spans == [((0, 0), 0, last), ((0, 0), last, len(whole.tokens))]
    assert all(span == span_from((0, 0), span.start, whole, 128, SHAPE) for span in spans)  # what waits is made again
    large = Illustrated(f"a {MARK} b", (np.zeros((64, 64, 3), np.uint8),))  # 16 tiles and the whole
    tokens, images = tokenise(large, tokenizer, SHAPE)
    assert images and len(images.tiles) == 17
    large = {(0, 1): Document(tokens, 0, 1, True, images)}
    spans = cut((0, 1), large[0, 1], len(tokens), SHAPE)
    counts = [stop - first for span in spans for first, stop in [tiles_of(Piece(*span, 0), large, SHAPE.tokens)]]
    assert counts == [0, 6, 6, 5]
    assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]] and spans[-1].stop == len(tokens)
    with pytest.raises(ValueError, match="a row has 17 tiles"):
        build_batch([([Piece((0, 1), 0, len(tokens), 0)], large)], len(tokens), 0, SHAPE)


def test_more_tiles_than_there_is_room_for_on_average_are_refused(tmp_path, tokenizer):
    """Else ever more documents would wait for a row that has room."""
    records = [dict(text=f"{MARK} number {n}", image=base64.b64encode(picture(n)).decode()) for n in range(60)]
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, records)))
    cfg = DataConfig(sources={"pictures": str(tmp_path / "pictures.jsonl")}, heldout=0.1)
    corpus = Corpus.open(cfg, tmp_path / "cache", lambda _: None, tokenizer, images=(2, 16, 4))
    with pytest.raises(ValueError, match=r"tiles on average, .* of pictures, for which train\.tiles \(2\)"):
        corpus.train(2, 128, 16, seed=0)
    more = corpus.of(cfg, images=(40, 16, 4))  # as another stage may give them
    with contextlib.closing(more.train(2, 128, 16, seed=0)) as stream:
        assert next(stream).tiles.shape == (2, 40, 16, 16, 3)


def test_images_without_room_are_refused(tokenizer):
    text = Illustrated(f"{MARK} a", (picture(0),))
    with pytest.raises(ValueError, match=r"for which train\.tiles leaves no room"):
        tokenise(text, tokenizer, None)
    plain = SentencePieceTokenizer(train_bpe([f"a few words of text, number {n}" for n in range(300)], 320))
    with pytest.raises(ValueError, match="the tokenizer has no special tokens"):
        tokenise(text, plain, SHAPE)


def test_a_stream_with_images_goes_on_where_it_was(tmp_path):
    """Text and images in one mixture; rows never have more tiles than there is room for; resumed, bit for bit."""
    rng = np.random.default_rng(0)
    words = [dict(text=" ".join(rng.choice(["a", "few", "words", "of", "text"], 30))) for _ in range(60)]
    pictures = [dict(text=f"{MARK} number {n}", image=base64.b64encode(picture(n)).decode()) for n in range(60)]
    for name, records in (("words", words), ("pictures", pictures)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("words", "pictures")}
    cfg = DataConfig(sources=places, vocab_size=310, heldout=0.1, weights={"pictures": 0.5})
    shape = ImageShape(tiles=3, size=16, tokens=4)
    corpus = Corpus.open(cfg, tmp_path / "cache", log=lambda _: None, images=shape)
    stream = corpus.train(2, 64, 16, seed=0)
    batches = [next(stream) for _ in range(6)]
    place = stream.get_state()
    after = [next(stream) for _ in range(3)]
    stream.close()
    assert all(batch.tiles.shape == (2, 3, 16, 16, 3) for batch in batches)
    assert any((batch.slots >= 0).any() for batch in batches)
    resumed = corpus.train(2, 64, 16, seed=0, place=place)
    for a in after:
        for x, y in zip(a, next(resumed), strict=True):
            np.testing.assert_array_equal(x, y)
    resumed.close()
    held_out = list(corpus.heldout_of("pictures", 2, 64, 16))
    named = sum(len(np.unique(b.document_id[b.document_id >= 0])) for b in held_out)
    assert named >= len(corpus._heldout[corpus.domains.index("pictures")]) > 0
