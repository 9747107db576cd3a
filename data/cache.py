"""Small derived files (a trained tokenizer, extracted text, an index), built once and reused when intact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b

from etils import epath


def fingerprint(parts: Iterable[object]) -> str:
    """A key of 16 hexadecimal digits for what a file was made from; bytes count as they are, the rest by str."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def cached(path: epath.Path, build: Callable[[], bytes]) -> bytes:
    """The content of `path`, or of `build()` written there.

    Object stores know neither rename nor locks, so a file counts only when the checksum beside it, written last,
    agrees: a torn or concurrent write is rebuilt, and concurrent writers of a deterministic `build` agree.
    """
    seal = path.with_name(path.name + ".blake2b")
    if path.exists() and seal.exists():
        content = path.read_bytes()
        if fingerprint([content]) == seal.read_text():
            return content
    content = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    seal.write_text(fingerprint([content]))
    return content
