"""The corpora that need no download: the running interpreter's standard library, and prose out of packages.

"code" is the standard library's modules, "prose" the documentation inside the packages that this project depends on.
"digits" is images with captions: the handwritten digits of scikit-learn (8 x 8 pixels, of UCI's optical recognition
set), some in a row, each followed by its name.
"""

from __future__ import annotations

import ast
import gc
import gzip
import importlib.util
import inspect
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from data.cache import cached, fingerprint
from data.content import MARK, Illustrated

NAMES = ("code", "prose", "digits")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_IN_A_ROW = 4  # of a document
PROSE_PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "orbax", "grain", "matplotlib")
MIN_DOCSTRING = 200  # characters
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Tests, generated tables, and other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "_testing", "encodings", "pydoc_data", "__pycache__",
                    "site-packages", "dist-packages"}  # fmt: skip


def texts(name: str, cache: epath.Path) -> list[str]:
    """The documents of an embedded corpus, one of `NAMES`."""
    found: dict[str, Callable[[], list[str]]] = {
        "code": lambda: list(_standard_library()), "prose": lambda: _prose(cache), "digits": digits
    }  # fmt: skip
    return found[name]()


def digits() -> list[str]:
    """Documents of a few digits each, of no digit two: `<|image|> seven<|image|> three ...`."""
    pixels, names = _digits()
    order = np.random.default_rng(0).permutation(len(names))  # as filed, one can be told from those before it
    pixels, names = pixels[order], names[order]
    images = [(16 * row.reshape(8, 8)).clip(0, 255).astype(np.uint8) for row in pixels]
    return [
        Illustrated("".join(f"{MARK} {DIGIT_NAMES[name]}" for name in names[some]), tuple(images[some]))
        for some in (slice(first, first + DIGITS_IN_A_ROW) for first in range(0, len(images), DIGITS_IN_A_ROW))
    ]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 64] of 0 to 16 and names [N], out of scikit-learn's file, without importing it."""
    found = [root / "datasets/data/digits.csv.gz" for root in _package_folders("sklearn")]
    if not found or not found[0].exists():
        raise ValueError("embedded:digits are those of scikit-learn: run pip install scikit-learn")
    table = np.loadtxt(gzip.open(found[0], "rt"), delimiter=",", dtype=np.int64)  # noqa: SIM115
    return table[:, :-1], table[:, -1]


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
