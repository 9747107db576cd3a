"""An object store under s3://, for sources, caches and conversions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from etils import epath
from object_store import Store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[epath.Path]:
    from fsspec.registry import _registry

    monkeypatch.setitem(_registry, "s3", Store)
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    Store.clear_instance_cache()
    yield epath.Path("s3://bucket")
    Store.clear_instance_cache()
