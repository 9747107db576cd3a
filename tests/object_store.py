"""An object store in memory, which knows neither rename nor append: for epath by fsspec, for tensorstore by HTTP."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import parse_qs, unquote, urlsplit

from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
    """What lies under s3://, in memory: whole objects are put and read, nothing else."""

    protocol = "s3"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    root_marker = "/"

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, str):
            path = path.removeprefix("s3:/").removeprefix("gs:/")
        return MemoryFileSystem._strip_protocol(path)

    def _open(self, path, mode="rb", **how):
        if mode not in ("rb", "wb", "xb"):
            raise NotImplementedError(f"an object store cannot open with {mode!r}")
        return super()._open(path, mode, **how)

    def mv(self, *args, **how):
        raise NotImplementedError("an object store cannot rename")

    rename = move = mv


class GoogleStore(Store):
    """Under gs://, where a folder is there as long as something lies in it."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012


class _Objects(BaseHTTPRequestHandler):
    """As much of Google's JSON interface as tensorstore uses."""

    protocol_version = "HTTP/1.1"
    generations: dict[str, int] = {}  # noqa: RUF012
    count = itertools.count(1)
    fails: Random | None = None
    share = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        url, fs = urlsplit(self.path), GoogleStore()
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fails and self.fails.random() < self.share:
            return self._answer(503, b"busy")
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        name = unquote(name.removeprefix("/"))
        if self.command == "POST":
            name = query["name"]
            path = f"/{bucket}/{name}"
            has = self.generations.get(path, 0) if fs.exists(path) else 0
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != has:
                return self._answer(412)
            fs.pipe_file(path, body)
            self.generations[path] = next(self.count)
            return self._answer(200, json.dumps(self._facts(path, name)).encode(), Content_Type="application/json")
        if not name:
            start = f"/{bucket}/{query.get('prefix', '')}"
            found = sorted(path for path in fs.find(f"/{bucket}") if path.startswith(start))
            items = [self._facts(path, path.removeprefix(f"/{bucket}/")) for path in found]
            return self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
        path = f"/{bucket}/{name}"
        if not fs.exists(path):
            return self._answer(404)
        generation = self.generations.setdefault(path, next(self.count))
        if self.command == "DELETE":
            fs.rm_file(path)
            return self._answer(204)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        content, where = fs.cat_file(path), self.headers.get("Range")
        if not where:
            return self._answer(200, content, x_goog_generation=generation)
        first, _, last = where.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        part = content[start : int(last) + 1 if first and last else None]
        about = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return self._answer(206, part, Content_Range=about, x_goog_generation=generation)

    def _facts(self, path: str, name: str) -> dict[str, str]:
        size = len(GoogleStore().cat_file(path))
        return dict(name=name, generation=str(self.generations.setdefault(path, next(self.count))), size=str(size))

    do_GET = do_POST = do_DELETE = _handle


@contextmanager
def google(monkeypatch, fails: float = 0.0, seed: int = 0) -> Iterator[str]:
    """gs://bucket, for epath and for tensorstore; of the latter's requests a share `fails` with 503."""
    from fsspec.registry import _registry

    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, GoogleStore)
    monkeypatch.setattr(GoogleStore, "store", {})
    monkeypatch.setattr(GoogleStore, "pseudo_dirs", [""])
    GoogleStore.clear_instance_cache()
    monkeypatch.setattr(_Objects, "generations", {})
    monkeypatch.setattr(_Objects, "fails", Random(seed))
    monkeypatch.setattr(_Objects, "share", fails)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Objects)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        yield "gs://bucket"
    finally:
        server.shutdown()
        server.server_close()
        GoogleStore.clear_instance_cache()
