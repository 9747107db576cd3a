"""Where documents come from, and which of them are held out.

Two corpora are embedded, with no download: "code" is the running interpreter's standard library, "prose" the
documentation inside the packages that this project depends on. Users bring JSONL.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import io
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from etils import epath

from data.cache import cached, fingerprint

PROSE_PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "orbax", "grain", "matplotlib")
MIN_DOCSTRING = 200  # characters
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Tests, generated tables, and other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "_testing", "encodings", "pydoc_data", "__pycache__",
                    "site-packages", "dist-packages"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The documents of one domain, read at random by index."""

    name: str
    hashes: np.ndarray  # uint64 [N], `content_hash` of every document
    sizes: np.ndarray  # int64 [N], bytes of UTF-8
    read: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, index: int) -> str:
        return self.read(index)


def content_hash(text: bytes) -> int:
    """64 bits of blake2b of a document's UTF-8: it decides what is held out, whatever the order of the documents."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def from_texts(name: str, texts: Sequence[str]) -> Source:
    """A source over texts in memory; empty and repeated ones are dropped."""
    unique = {content_hash(raw): (text, len(raw)) for text in texts if (raw := text.encode()).strip()}
    kept, sizes = [text for text, _ in unique.values()], [size for _, size in unique.values()]
    return Source(name, np.fromiter(unique, np.uint64, len(unique)), np.array(sizes, np.int64), kept.__getitem__)


def embedded(cache: epath.Path) -> list[Source]:
    """The corpora that need no download: domains "code" and "prose"."""
    return [from_texts("code", list(_standard_library())), from_texts("prose", _prose(cache))]


def _modules(root: Path) -> Iterator[Path]:
    """The .py files of a package in a fixed order, without tests and generated tables."""
    found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    for relative, path in sorted(found, key=lambda item: item[0].parts):
        # _sysconfigdata_* holds the build flags of one machine.
        if not _SKIPPED_FOLDERS & set(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def _standard_library() -> Iterator[str]:
    for path in _modules(Path(sysconfig.get_path("stdlib"))):
        try:
            with tokenize.open(path) as file:  # honours the file's own encoding line
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def _prose(cache: epath.Path) -> list[str]:
    """pydoc's topics, then one document for each source file: its docstrings, none of them twice."""
    topics = [path for root in _package_folders("pydoc_data") for path in root.glob("topics.py")]
    roots = [(name, root) for name in PROSE_PACKAGES for root in _package_folders(name)]
    files = [(f"{name}/{path.relative_to(root)}", path) for name, root in roots for path in _modules(root)]
    sizes = (path.stat().st_size for path in (*topics, *(path for _, path in files)))
    key = fingerprint([sys.version_info, MIN_DOCSTRING, *(name for name, _ in files), *sizes])

    def extract() -> bytes:
        seen: set[str] = set()
        documents = [text for path in topics for text in _literal_values(path)]
        for _, path in files:
            fresh = [text for text in _docstrings(path) if text not in seen]
            seen.update(fresh)
            if fresh:
                documents.append("\n\n".join(dict.fromkeys(fresh)) + "\n")
        return json.dumps(documents, ensure_ascii=False).encode()

    return json.loads(cached(cache / f"prose-{key}.json", extract))


def _package_folders(name: str) -> list[Path]:
    """Where a package's files lie, found without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(name)
    return [] if spec is None else sorted(map(Path, spec.submodule_search_locations or ()))


def _parse(path: Path) -> ast.Module:
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is a million small objects and no garbage: collecting doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(path.read_bytes())
    finally:
        if collecting:
            gc.enable()


def _literal_values(path: Path) -> list[str]:
    """The values of a module's one dict of string literals, `topics = {name: text}`, without importing it."""
    tables = [node.value for node in _parse(path).body if isinstance(node, ast.Assign)]
    return [str(ast.literal_eval(value)) for table in tables if isinstance(table, ast.Dict) for value in table.values]


def _docstrings(path: Path) -> Iterator[str]:
    """Dedented docstrings of at least MIN_DOCSTRING characters, in the file's order, without importing it."""
    try:
        tree = _parse(path)
    except SyntaxError:  # written for another version of Python
        return
    for node in _definitions(tree):
        raw = ast.get_docstring(node, clean=False)
        if raw is not None and len(raw) >= MIN_DOCSTRING and len(text := inspect.cleandoc(raw)) >= MIN_DOCSTRING:
            # A literal may hold half of a surrogate pair, which is no text.
            yield text.encode("utf-8", "replace").decode()


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """The module, classes and functions at and below a statement; expressions, the bulk of a tree, are not walked."""
    if isinstance(node, _Documented):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _definitions(child)


def jsonl(path: epath.PathLike, cache: epath.Path) -> list[Source]:
    """Documents of a JSONL file, or of every `*.jsonl` in a folder: {"text": ..., "domain": ...} a line.

    "domain" is optional ("text"). One pass checks every line and remembers where it starts; the index is cached
    under the files' names, sizes and dates. A bad line is a ValueError that names the file and the line.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.jsonl: nothing at {path}")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"data.jsonl: no .jsonl file in the folder {path}")
    stats = [(file, file.stat()) for file in files]
    key = fingerprint(f"{file}:{stat.length}:{stat.mtime}" for file, stat in stats)
    index = np.load(io.BytesIO(cached(cache / f"jsonl-{key}.npz", lambda: _index_jsonl(files))))
    names, domain = [str(name) for name in index["names"]], index["domain"]
    if not names:
        raise ValueError(f"data.jsonl: no documents in {path}")
    return [
        _jsonl_source(name, files, *(index[k][domain == d] for k in ("hash", "size", "shard", "start", "length")))
        for d, name in enumerate(names)
    ]


def _jsonl_source(name: str, files: list[epath.Path], hashes: np.ndarray, sizes: np.ndarray, shard: np.ndarray,
                  start: np.ndarray, length: np.ndarray) -> Source:  # fmt: skip
    def read(index: int) -> str:
        with files[shard[index]].open("rb") as lines:
            lines.seek(int(start[index]))
            return json.loads(lines.read(int(length[index])))["text"]

    return Source(name, hashes, sizes, read)


def _index_jsonl(files: list[epath.Path]) -> bytes:
    rows: list[tuple[int, int, int, int, int, str]] = []
    for f, file in enumerate(files):
        start = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    raw, domain = _check_line(line, f"{file}, line {number}")
                    rows.append((content_hash(raw), len(raw), f, start, len(line), domain))
                start += len(line)
    names = sorted({row[-1] for row in rows})
    columns = list(zip(*rows, strict=True)) or [()] * 6
    number = {name: n for n, name in enumerate(names)}
    output = io.BytesIO()
    np.savez(
        output,
        hash=np.array(columns[0], np.uint64),
        size=np.array(columns[1], np.int64),
        shard=np.array(columns[2], np.int32),
        start=np.array(columns[3], np.int64),
        length=np.array(columns[4], np.int64),
        domain=np.array([number[name] for name in columns[5]], np.int32),
        names=np.array(names, np.str_),
    )
    return output.getvalue()


def _check_line(line: bytes, where: str) -> tuple[bytes, str]:
    """The text (UTF-8) and the domain of a line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected an object with a string "text", as in {{"text": "...", "domain": "..."}}')
    domain = record.get("domain", "text")
    if not isinstance(domain, str) or not domain:
        raise ValueError(f'{where}: "domain" must be a string that is not empty, not {domain!r}')
    try:
        return record["text"].encode(), domain
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "text" is not Unicode ({error.reason})') from error


def split(sources: Sequence[Source], share: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Indices of (training, held-out) documents of every source.

    A document is held out when its content hash lies in the lowest `share` of the hash range, so copies of it go the
    same way in every domain and on every machine, in any order. A domain of which nothing fell there gives its
    smallest hash. Held-out indices come in the order of their hashes, which is a fixed random order.
    """
    threshold = np.uint64(int(share * 2.0**64))
    heldout = [np.unique(source.hashes[source.hashes < threshold]) for source in sources]
    chosen = np.concatenate(
        [h if len(h) else s.hashes.min(keepdims=True) for h, s in zip(heldout, sources, strict=True)]
    )
    train, held = [], []
    for source in sources:
        out = np.isin(source.hashes, chosen)
        if out.all():
            raise ValueError(
                f"domain {source.name!r} has {len(np.unique(source.hashes))} distinct document(s), all held out: "
                "give it more documents"
            )
        train.append(np.flatnonzero(~out))
        _, first = np.unique(source.hashes[out], return_index=True)  # one copy of each, by hash
        held.append(np.flatnonzero(out)[first])
    return train, held
