"""What a folder of files must hold: a manifest of their sizes and SHA-256, written after all of them.

A folder without a manifest was not finished. One that does not agree with its manifest is damaged, and is set aside,
never deleted. Everything works in a store (`gs://`, `s3://`): whole files are written and read, nothing is renamed or
appended to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

FILE = "manifest.json"
VERSION = 1
THREADS = min(8, os.cpu_count() or 1)  # hashing leaves the interpreter free
PIECE = 1 << 20
PATIENCE = 1800.0
"""Seconds for which a process waits for what others write."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""Of a file or folder that something read from outside may name: it cannot leave its folder."""

T = TypeVar("T")


def digest(file: epath.Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    found = hashlib.sha256()
    with file.open("rb") as f:
        while piece := f.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def files(folder: epath.Path) -> dict[str, epath.Path]:
    """Every file below the folder but manifests of it, by its path within, in order."""
    return {name: file for name, file in sorted(_walk(folder, "")) if not _is_manifest(name)}


def write(folder: epath.Path, process: int = 0, processes: int = 1, known: Mapping[str, str] | None = None) -> None:
    """Hash the folder's files and write its manifest; with several processes each calls this and hashes a share.

    `known`: digests of files, by their path within, that were taken as these were written, and are not read again.
    Returns, on every process, when the manifest is there. TimeoutError where another one's share does not come.
    """
    found = list(files(folder).items())[process::processes]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda item: (known or {}).get(item[0]) or digest(item[1]), found)
        share = {name: [file.stat().length, of] for (name, file), of in zip(found, digests, strict=True)}
    if process:
        persist(lambda: (folder / f"{FILE}.{process}").write_text(json.dumps(share)))
        _await(folder / FILE)
        return
    parts = [folder / f"{FILE}.{other}" for other in range(1, processes)]
    for part in parts:
        share |= _await(part)
    text = _text(share)
    persist(lambda: (folder / FILE).write_text(text))
    for part in parts:
        part.unlink()


def problems(folder: epath.Path, process: int = 0, processes: int = 1, within: str = "") -> list[str]:
    """What is wrong with the folder, a line each: no manifest or a damaged one, files missing, cut short, changed or
    too many; of the folder `within` alone, if one is named. Of several processes each looks at a share of the files."""
    try:
        wanted = read(folder)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    prefix = f"{within}/" if within else ""
    wanted = {name: facts for name, facts in wanted.items() if name.startswith(prefix)}
    found = {prefix + name: file for name, file in files(folder / within).items()} if (folder / within).exists() else {}
    extra = sorted(set(found) - set(wanted))
    out = [f"{extra[0]} is not in the manifest ({len(extra)} such files)"] if extra else []

    def problem(name: str) -> str | None:
        size, of = wanted[name]
        if name not in found:
            return f"{name} is missing"
        if (has := found[name].stat().length) != size:
            return f"{name} has {has} bytes of {size}"
        return None if digest(found[name]) == of else f"{name} is not what was written"

    with ThreadPoolExecutor(THREADS) as pool:
        return out + [line for line in pool.map(problem, sorted(wanted)[process::processes]) if line]


def read(folder: epath.Path) -> dict[str, list[Any]]:
    """{path: [bytes, SHA-256]}; FileNotFoundError without a manifest, ValueError for one that was changed."""
    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{FILE} is missing")
    text = (folder / FILE).read_bytes()
    try:
        listed: dict[str, list[Any]] = json.loads(text)["files"]
        whole = _text(listed).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{FILE} is not what was written")
    return listed  # pyright: ignore[reportPossiblyUnboundVariable]


def finished(folder: epath.Path) -> list[int]:
    """Of the folders within that are named by a step those that have a manifest, in order; none is looked into."""
    entries = folder.iterdir() if folder.exists() else ()
    return sorted(int(f.name) for f in entries if f.name.isdecimal() and (f / FILE).exists())


def name_of(folder: epath.Path) -> str:
    """A digest that names all that the folder holds."""
    return digest(folder / FILE)


def persist(do: Callable[[], T], tries: int = 4, pause: float = 0.5) -> T:
    """`do`, tried again after an OSError that may pass: a store's hiccup, not a full disk or one that cannot be
    written."""
    for left in range(tries - 1, 0, -1):
        try:
            return do()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if error.errno in (28, 30, 122):  # no space, read-only, quota
                raise
            time.sleep(pause * 2 ** (tries - 1 - left))
    return do()


def move(folder: epath.Path, to: epath.Path) -> None:
    """The folder to another place: renamed where there are renames, else copied file by file and then deleted."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in str(folder):
        folder.rename(to)
        return
    for name, file in _walk(folder, ""):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(file.read_bytes())
    folder.rmtree()


def _walk(folder: epath.Path, prefix: str) -> Iterator[tuple[str, epath.Path]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry


def _is_manifest(name: str) -> bool:
    return re.fullmatch(re.escape(FILE) + r"(\.\d+)?", name) is not None


def _text(listed: dict[str, list[Any]]) -> str:
    """With a digest of itself, so that a change of the manifest is seen too."""
    lines = json.dumps(listed, sort_keys=True, indent=0)
    of = hashlib.sha256(lines.encode()).hexdigest()
    return json.dumps({"version": VERSION, "digest": of, "files": listed}, sort_keys=True, indent=0) + "\n"


def _await(file: epath.Path) -> Any:
    """What a file of JSON holds, once it is there and whole: on a disk it is there before it is written."""
    until = time.monotonic() + PATIENCE
    while True:
        if file.exists():
            text = persist(file.read_text)
            with contextlib.suppress(ValueError):
                return json.loads(text)
        if time.monotonic() > until:
            raise TimeoutError(f"{file} did not come within {PATIENCE:.0f} s")
        time.sleep(0.05)
