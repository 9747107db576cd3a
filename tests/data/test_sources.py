"""Sources: JSONL read at random and checked by the line, the embedded corpora, and a split by content alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils import epath

from data import embedded, records, sources
from data.cache import cached


def write_jsonl(path, records) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))


def jsonl(path, cache) -> list[sources.Source]:
    return sources.open_sources({"text": str(path)}, cache)


def texts(source: sources.Source) -> list[str]:
    return [source[i] for i in range(len(source))]


def test_jsonl_reads_every_line_of_every_file_by_index(tmp_path):
    cache = epath.Path(tmp_path / "cache")
    folder = tmp_path / "docs"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", [{"text": "third", "domain": "x"}, "", {"text": "vierte\n größte"}])
    write_jsonl(folder / "a.jsonl", [{"text": "first", "domain": "x"}, {"text": "second 漢字", "domain": "y"}])
    (folder / "notes.txt").write_text("not read")
    found = {source.name: source for source in jsonl(folder, cache)}
    assert {name: texts(source) for name, source in found.items()} == {
        "text": ["vierte\n größte"], "x": ["first", "third"], "y": ["second 漢字"],
    }  # fmt: skip
    for source in found.values():
        raw = [text.encode() for text in texts(source)]
        assert source.hashes.tolist() == [sources.content_hash(r) for r in raw]
        assert source.sizes.tolist() == [len(r) for r in raw]
    assert texts(jsonl(folder / "b.jsonl", cache)[1]) == ["third"]


def test_a_changed_jsonl_is_indexed_anew(tmp_path):
    cache, file = epath.Path(tmp_path / "cache"), tmp_path / "d.jsonl"
    write_jsonl(file, [{"text": "one"}])
    assert texts(jsonl(file, cache)[0]) == ["one"]
    write_jsonl(file, [{"text": "zero"}, {"text": "one"}])
    assert texts(jsonl(file, cache)[0]) == ["zero", "one"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "not an object"),
        ('{"txt": "a"}', 'no string "text" or "content"'),
        ('{"text": 3}', 'no string "text" or "content"'),
        ('{"text": "a", "domain": 7}', '"domain" is no string'),
        ('{"text": "\\ud800"}', "not Unicode"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, what):
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "good"}, "", line])
    with pytest.raises(ValueError, match=f"bad.jsonl, line 3: .*{what}"):
        jsonl(tmp_path / "bad.jsonl", epath.Path(tmp_path / "cache"))


def test_an_empty_domain_is_none(tmp_path):
    """Here as in a conversion."""
    write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "domain": ""}, {"text": "b", "domain": None}, {"text": "c"}])
    (source,) = sources.open_sources({"web": str(tmp_path / "d.jsonl")}, epath.Path(tmp_path / "cache"))
    assert source.name == "web" and texts(source) == ["a", "b", "c"]
    assert records.converted({"text": "a", "domain": ""}).domain == ""


def test_a_byte_order_mark_before_a_record_is_none_of_it(tmp_path):
    """Here as in a conversion: files that were put together have some in their middle."""
    (tmp_path / "d.jsonl").write_text("".join(f'\ufeff{{"text": "{text}"}}\n' for text in "ab"))
    (source,) = jsonl(tmp_path / "d.jsonl", epath.Path(tmp_path / "cache"))
    part = records.InputPart(str(tmp_path / "d.jsonl"), "lines", 0, 0)
    assert texts(source) == [load()["text"] for _, load in records.records(part, "", lambda read: None)] == ["a", "b"]


def test_nothing_to_read_is_said(tmp_path):
    cache = epath.Path(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"nothing at .*gone"):
        jsonl(tmp_path / "gone", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is none of the kinds; supported are \*\.jsonl"):
        jsonl(tmp_path / "empty", cache)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no documents in"):
        jsonl(tmp_path / "empty.jsonl", cache)


def test_the_embedded_corpora(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PROSE_PACKAGES", ("optax", "no_such_package"))
    code, prose = sources.open_sources({}, epath.Path(tmp_path))
    assert (code.name, prose.name) == ("code", "prose")
    assert (
        len(code) > 300 and code.sizes.sum() > 5_000_000 and any(text.startswith('"""Text wrapping') for text in code)
    )
    assert len(prose) > 50 and all("def " not in text[:4] for text in texts(prose))
    assert any("Adam" in text for text in texts(prose))
    for source in (code, prose):
        assert len(set(source.hashes.tolist())) == len(source), "no document twice"
    again = sources.open_sources({}, epath.Path(tmp_path))  # from the cache this time
    assert all(np.array_equal(a.hashes, b.hashes) for a, b in zip((code, prose), again, strict=True))


def test_docstrings_come_in_order_dedented_and_without_import(tmp_path):
    long = "y" * embedded.MIN_DOCSTRING
    (tmp_path / "m.py").write_text(
        f'"""Module {long}"""\nraise SystemExit\ndef f():\n    """Short."""\n    class C:\n'
        f'        """Inner {long}\n\n            More.\n        Last.\n        """\nif f:\n    def g(): "G {long}"\n'
    )
    (tmp_path / "newer.py").write_text("def = 3")
    expected = [f"Module {long}", f"Inner {long}\n\n    More.\nLast.", f"G {long}"]
    assert list(embedded._docstrings(tmp_path / "m.py")) == expected
    assert list(embedded._docstrings(tmp_path / "newer.py")) == []


def numbered(name: str, numbers) -> sources.Source:
    all_texts = [f"document {n}" for n in numbers]
    raw = [text.encode() for text in all_texts]
    hashes = np.array([sources.content_hash(r) for r in raw], np.uint64)
    return sources.Source(name, hashes, np.array([len(r) for r in raw]), all_texts.__getitem__)


def test_split_is_by_content_whatever_the_order_and_copies_go_together():
    a, b = numbered("a", [*range(2000), *range(500)]), numbered("b", range(1000, 4000))
    train, heldout = sources.split([a, b], 0.05)
    held = [{s[int(i)] for i in part} for s, part in zip((a, b), heldout, strict=True)]
    kept = [{s[int(i)] for i in part} for s, part in zip((a, b), train, strict=True)]
    assert not (held[0] | held[1]) & (kept[0] | kept[1]), "disjoint across domains too"
    assert held[0] | kept[0] == {f"document {n}" for n in range(2000)}
    assert 0.035 < len(held[0]) / 2000 < 0.065
    order = np.random.default_rng(0).permutation(4000).tolist()
    shuffled = numbered("c", order)
    _, (other,) = sources.split([shuffled], 0.05)
    assert [shuffled[int(i)] for i in other if int(shuffled[int(i)].split()[1]) < 2000] == [
        a[int(i)] for i in heldout[0]
    ]


def test_split_golden():
    """The choice is a property of the bytes, on every machine."""
    _, (heldout,) = sources.split([numbered("a", range(200))], 0.02)
    assert sources.content_hash(b"document 0") == 1904991786024820578
    assert heldout.tolist() == [98, 24, 44, 17]


def test_small_domains_hold_out_their_smallest_hash():
    small, big = numbered("small", range(3)), numbered("big", range(3, 500))
    train, heldout = sources.split([small, big], 0.001)
    assert heldout[0].tolist() == [int(small.hashes.argmin())] and len(train[0]) == 2
    with pytest.raises(ValueError, match="domain 'one' has 1 distinct document"):
        sources.split([numbered("one", [1, 1, 1])], 0.02)


def test_a_torn_cache_file_is_built_again(tmp_path):
    file, built = epath.Path(tmp_path / "x" / "file"), []

    def build() -> bytes:
        built.append(1)
        return b"content"

    assert [cached(file, build) for _ in range(2)] == [b"content"] * 2 and len(built) == 1
    file.write_bytes(b"cont")
    assert cached(file, build) == b"content" and len(built) == 2
