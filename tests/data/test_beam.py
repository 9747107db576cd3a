"""A conversion as an Apache Beam pipeline, with the extra beam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.convert import convert
from data.shards import Options

BEAM = ["--runner=DirectRunner"]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_pipeline_writes_the_same_shards(tmp_path: Path):
    pytest.importorskip("apache_beam")
    for name in "abc":
        lines = [json.dumps({"text": f"{name} {n} " * 2000}) for n in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    inputs = [tmp_path / f"{name}.jsonl" for name in "abc"]

    def run(folder: str, **how: Any) -> tuple[dict[str, Any], bool]:
        return convert(inputs, tmp_path / folder, Options(shard_mb=1), log=lambda _: None, **how)

    by_beam, fresh = run("beam", beam=BEAM)
    assert fresh and by_beam["documents"] == 1200 and len(by_beam["shards"]) > 3
    assert run("here") == (by_beam, True) and content(tmp_path / "beam") == content(tmp_path / "here")
    assert run("beam", beam=BEAM) == (by_beam, False)
