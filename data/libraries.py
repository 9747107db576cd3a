"""Documents of the datasets that a library finds by name: TensorFlow Datasets and Hugging Face datasets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data.content import FIELDS as IMAGE_FIELDS
from data.index import TEXT_FIELDS, Item, one_line

SPLIT = "train"
_PLACE = re.compile(r"(.+?)(?::([A-Za-z_]\w*(?:\[[^\]/]*\])?))?", re.DOTALL)


class Examples:
    """A sequence of examples, each a mapping, as one shard."""

    unit = "record"

    def __init__(self, name: str, examples: Sequence[Mapping[str, Any]], stamp: Iterable[object]):
        self.shards = [name]
        self.examples, self._stamp = examples, list(stamp)

    def stamp(self) -> Iterable[object]:
        return [self.shards[0], *self._stamp]

    def size(self, shard: int) -> int:
        return 0

    def known(self, shard: int, log: Callable[[str], object]) -> Mapping[str, np.ndarray] | None:
        return None

    def scan(self, shard: int) -> Iterator[Item]:
        for i in range(len(self.examples)):
            try:
                yield Item(i + 1, i, 1, self.read(0, i, 1))
            except ValueError as error:
                yield Item(i + 1, i, 1, {}, str(error))

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        try:
            return self.examples[start]
        except Exception as error:  # of whatever the library reads with
            raise ValueError(f"cannot be read ({one_line(error)})") from error


def _parse(place: str) -> tuple[str, str]:
    """(name or folder, split) of NAME[:SPLIT]."""
    found = _PLACE.fullmatch(place)
    assert found  # any text that is not empty
    return found[1], found[2] or SPLIT


def tfds(place: str, cache: epath.Path) -> Examples:
    """NAME[/CONFIG][@DATA_DIR][:SPLIT] or FOLDER[:SPLIT], prepared before in ArrayRecord form."""
    import tensorflow_datasets

    name, wanted = _parse(place)
    dataset, at, data_dir = name.partition("@")
    try:
        if epath.Path(name).is_dir():
            builder = tensorflow_datasets.builder_from_directory(name)
        elif name.startswith((".", "/", "~")) or "://" in dataset:
            raise FileNotFoundError(f"nothing at {name}")
        else:
            builder = tensorflow_datasets.builder(dataset, data_dir=data_dir if at else None)
        splits = list(builder.info.splits)
        if re.split(r"\W", wanted)[0] not in splits:
            raise ValueError(f"no split {wanted!r}; it has {', '.join(splits) or 'none: it is not prepared'}")
        examples: Any = builder.as_data_source(wanted)  # type: ignore
        files = sorted(epath.Path(builder.data_path).iterdir(), key=str)
        stats = [f"{file.name}:{(stat := file.stat()).length}:{stat.mtime}" for file in files]
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"tfds cannot open {place}: {one_line(error)}") from error
    return Examples(f"tfds:{place}", examples, [builder.data_path, wanted, *stats])


def hf(place: str, cache: epath.Path) -> Examples:
    """NAME_OR_FOLDER[:SPLIT]: what `datasets.load_dataset` takes, or a folder that `save_to_disk` wrote."""
    try:
        import datasets  # type: ignore
    except ModuleNotFoundError as error:
        raise ValueError(
            f"hf:{place} needs the package datasets, the extra hf: pip install 'llama4_jax[hf]', or make EXTRAS=hf"
        ) from error

    name, wanted = _parse(place)
    try:
        folder = epath.Path(name)
        saved = folder.is_dir() and any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
        data: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=wanted)
        if isinstance(data, Mapping):  # splits by name
            if wanted not in data:
                raise ValueError(f"no split {wanted!r}; it has {', '.join(data)}")
            data = data[wanted]
        data = data.select_columns(
            [c for c in (*TEXT_FIELDS, "caption", "domain", *IMAGE_FIELDS) if c in data.column_names]
        )
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"hf cannot open {place}: {one_line(error)}") from error
    return Examples(f"hf:{place}", data, [wanted, data._fingerprint])
