"""What a host has is measured, and what is amiss is said."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from launch.doctor import describe
from training import doctor
from training.config import MeshConfig
from training.mesh import make_mesh


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    doctor.SIZES["cpu"] = (64, 1 << 16, 1 << 12, 1 << 16)
    return doctor.examine(make_mesh(MeshConfig(context=2)), str(tmp_path_factory.mktemp("run")), 0.001)


def test_everything_is_measured(found: dict):
    assert found["devices"]["count"] == 8 and found["devices"]["platform"] == "cpu"
    assert {*found["collectives"]} == {"fsdp", "context"} and {*found["rates"]} == {"matmul", "memory"}
    rates = [rate["value"] for rate in found["rates"].values()] + [*found["collectives"].values()]
    assert all(rate > 0 for rate in (*rates, found["storage"]["write"], found["storage"]["read"]))
    assert not list(Path(found["storage"]["folder"]).iterdir())


def test_it_is_told_in_lines(found: dict):
    lines = describe(found | {"advice": []})
    assert any(line.startswith("context axis") and "all-gather" in line for line in lines)
    assert lines[-1].endswith("none: nothing amiss was found")


def test_advice(found: dict, tmp_path: Path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# a comment\njax==0.0.1\n")
    bad = copy.deepcopy(found)
    bad["host"] |= dict(driver=True, files=256, proxies=["http_proxy"])
    bad["rates"]["matmul"] |= dict(share=0.3, sheet=1.0)
    bad["storage"]["write"] = 5e6
    bad["devices"]["here"] = 7
    said = "\n".join(doctor.advice(bad, pins))
    for words in ("install the extra cuda", "hosts are unequal", "matmul at 30% of the data sheet", "takes 5 MB/s",
                  "tested with 0.0.1", "ulimit -n 65536", "http_proxy set"):  # fmt: skip
        assert words in said, words
    good = copy.deepcopy(found)
    good["host"] |= dict(driver=False, files=65536, proxies=[])
    good["storage"]["write"] = 5e9
    assert doctor.advice(good) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot measure the storage of"):
        doctor.disk(str(tmp_path / "file" / "run"), 10)
