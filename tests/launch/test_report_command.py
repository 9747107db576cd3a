"""`llama4 report`: where the file goes, and what becomes of wrong folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from launch import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    records = [{"step": i, "loss": 5 - i / 10, "ce": 5 - i / 10, "eval/ce": 4.0} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(a) for a in arguments]))


def test_the_report_goes_into_the_run(folder, capsys):
    assert command(folder) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html")]
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_out_and_figure(folder, tmp_path, capsys):
    out, picture = tmp_path / "r.html", tmp_path / "r.png"
    assert command(folder, folder, "--out", out, "--figure", picture) == 0
    assert capsys.readouterr().out.split() == [str(out), str(picture)]
    assert out.stat().st_size > 10_000 and picture.read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "report.html").exists()


def test_a_wrong_folder_names_the_nearest(folder):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*/oen; the nearest run is .*/one$"):
        command(folder.parent / "oen")


@pytest.mark.parametrize("option", ["--out", "--figure"])
def test_nothing_is_written_into_a_folder_that_is_not_there(folder, tmp_path, option):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write x"):
        command(folder, option, tmp_path / "nowhere" / "x")
    assert [f.name for f in folder.iterdir()] == ["metrics.jsonl"]
