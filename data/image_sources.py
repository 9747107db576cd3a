"""Where documents with images come from, beside the fields of records (`data/content.py`).

    images:FOLDER      image files; a caption each in a file of the same name that ends in .txt, or, for any number of
                       them, in metadata.jsonl or captions.jsonl: {"file_name": "a/b.jpg", "text": "..."} a line
    webdataset:PATH    .tar files of samples: members whose names agree up to the first dot, an image (.jpg .png .webp
                       ...) or several (1.jpg 2.jpg ...), and .txt, or .json with a "text" (or "caption")
    video:FOLDER       videos (.mp4 .webm .mkv .avi .mov .gif), captions as of images: up to `FRAMES` frames of each, at
                       even distances, one tile each, in front of the caption (needs the extra `video`)

All are read at random, and what is damaged counts as a bad record.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data.formats import Files, json_object, path_of
from data.index import MAX_DOCUMENT, Item, one_line

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")
CAPTIONS = ("metadata.jsonl", "captions.jsonl")
FRAMES = 16  # of a video; below the 48 images that a document may have
MOST_FRAMES_READ = 20_000  # of a video whose length its file does not say


def _below(folder: epath.Path, suffixes: Sequence[str]) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir(), key=str):
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _below(path, suffixes)
        elif path.name.lower().endswith(tuple(suffixes)):
            yield path


class Captioned(Files):
    """Files of pixels in a folder, each one document with its caption."""

    kind, unit, suffixes = "images", "", IMAGES
    limit = MAX_DOCUMENT

    def find(self, place: str) -> list[epath.Path]:
        folder = path_of(place)
        if not folder.is_dir():
            raise ValueError(f"{place} is no folder: {self.kind}:FOLDER takes one, with a caption beside each file")
        files = list(_below(folder, self.suffixes))
        if not files:
            raise ValueError(f"no {', '.join(self.suffixes)} file in the folder {place}")
        return files

    def __init__(self, place: str, cache: epath.Path):
        super().__init__(place, cache)
        folder = path_of(place)
        self._captions: dict[str, str] = {}
        self._listed = [folder / name for name in CAPTIONS if (folder / name).exists()]
        for listed in self._listed:
            for number, line in enumerate(listed.read_bytes().splitlines(), 1):
                if line.strip():
                    record = json_object(line)
                    name, text = record.get("file_name"), record.get("text", record.get("caption"))
                    if not isinstance(name, str) or not isinstance(text, str):
                        raise ValueError(f'{listed}, line {number}: expected {{"file_name": "...", "text": "..."}}')
                    self._captions[str(folder / name)] = text

    def stamp(self) -> Any:
        yield from super().stamp()
        beside = [self._caption_file(shard) for shard in range(len(self.files))]
        for file in [*self._listed, *(file for file in beside if file.exists())]:
            stat = file.stat()
            yield f"{file}:{stat.length}:{stat.mtime}"

    def _caption_file(self, shard: int) -> epath.Path:
        return self.files[shard].with_suffix(".txt")

    def scan(self, shard: int) -> Iterator[Item]:
        try:
            yield Item(1, 0, 0, self.read(shard, 0, 0))
        except ValueError as error:
            yield Item(1, 0, 0, {}, str(error))

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        caption: str | bytes | None = self._captions.get(self.shards[shard])
        if caption is None:
            beside = self._caption_file(shard)
            if not beside.exists():
                raise ValueError(f"no caption: neither {beside.name} nor a line of {' or '.join(CAPTIONS)}")
            caption = beside.read_bytes()
        if self.size(shard) > self.limit:
            raise ValueError(f"a file of {self.size(shard):,} bytes, above {self.limit:,}")
        return {"text": caption, **self.pixels(shard)}

    def pixels(self, shard: int) -> Mapping[str, Any]:
        return {"image": self.files[shard].read_bytes()}


class Videos(Captioned):
    """As `Captioned`, of frames."""

    kind, suffixes, limit = "video", VIDEOS, 4 << 30

    def pixels(self, shard: int) -> Mapping[str, Any]:
        return {"images": frames(self.files[shard].read_bytes(), FRAMES), "most_tiles": 1}


def frames(data: bytes, most: int) -> list[np.ndarray]:
    """At most so many frames of a video, uint8 [height, width, 3], at even distances; ValueError for a damaged one."""
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("videos are read with the package av: run pip install 'llama4_jax[video]'") from error
    try:
        opened: Any = av.open(io.BytesIO(data))
        with opened as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            count = stream.frames or sum(
                1 for _ in zip(range(MOST_FRAMES_READ), container.decode(stream), strict=False)
            )
            if not stream.frames:
                container.seek(0)
            wanted = set(np.linspace(0, max(count - 1, 0), min(most, max(count, 1))).round().astype(int).tolist())
            last = max(wanted)
            found = []
            for n, frame in enumerate(container.decode(stream)):
                if n in wanted:
                    found.append(frame.to_ndarray(format="rgb24"))
                if n >= last:
                    break
    except Exception as error:  # of whatever the codec finds
        raise ValueError(f"a damaged video ({one_line(error)})") from None
    if not found:
        raise ValueError("a video without frames")
    return found


class WebDataset(Files):
    """A .tar file, or every one in a folder, of samples; nothing is unpacked: one seek finds a sample.

    Members of a sample stand side by side; its place is its first member's first byte and the bytes up to its last
    one's end.
    """

    kind, unit = "webdataset", "sample"

    def find(self, place: str) -> list[epath.Path]:
        path = path_of(place)
        files = list(_below(path, (".tar",))) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"no .tar file in the folder {place}")
        return files

    def scan(self, shard: int) -> Iterator[Item]:
        number, key, start, end, parts = 0, "", 0, 0, []
        try:
            with self.files[shard].open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # it would remember every one  # pyright: ignore[reportAttributeAccessIssue]
                    found = _KEY.fullmatch(member.name)
                    if not member.isfile() or not found:
                        continue
                    if found[1] != key and parts:
                        number += 1
                        yield self._item(shard, number, start, end)
                        parts = []
                    if not parts:
                        key, start = found[1], member.offset
                    parts.append(member.name)
                    end = member.offset_data + member.size
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            yield Item(number + 1, start, 0, {}, f"a damaged tar file: the rest of it is lost ({one_line(error)})")
            return
        if parts:
            yield self._item(shard, number + 1, start, end)

    def _item(self, shard: int, number: int, start: int, end: int) -> Item:
        try:
            return Item(number, start, end - start, self.read(shard, start, end - start))
        except ValueError as error:
            return Item(number, start, end - start, {}, str(error))

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        if length > MAX_DOCUMENT:
            raise ValueError(f"a sample of {length:,} bytes, above {MAX_DOCUMENT:,}")
        with self.files[shard].open("rb") as file:
            file.seek(start)
            data = file.read(length)
        fields: dict[str, Any] = {}
        pictures: list[tuple[str, bytes]] = []
        try:
            with tarfile.open(fileobj=io.BytesIO(data + b"\0" * 2048), mode="r:") as tar:
                for member in tar:
                    found = _KEY.fullmatch(member.name)
                    content = tar.extractfile(member)
                    if not found or content is None:
                        continue
                    extension, raw = found[2].lower(), content.read()
                    if extension == "txt":
                        fields["text"] = raw
                    elif extension == "json":
                        fields = dict(json_object(raw)) | fields
                    elif f".{extension}".endswith(IMAGES):
                        pictures.append((extension, raw))
        except tarfile.TarError as error:
            raise ValueError(f"a damaged sample ({one_line(error)})") from error
        if pictures:
            fields.pop("image", None)
            fields["images"] = [raw for _, raw in sorted(pictures, key=lambda part: _natural(part[0]))]
        return fields


_KEY = re.compile(r"((?:.*/)?[^./]+)\.(.+)")


def _natural(name: str) -> list[Any]:
    """2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
