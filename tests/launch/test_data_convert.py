"""The convert command's options, its lines, and its exit from what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from data import convert as conversion
from data import sources
from data.config import DataConfig
from data.shards import Options
from launch import cli, data_verify
from launch import data_convert as convert
from launch.cli import Parser

ROOT = Path(__file__).resolve().parents[2]
MAIN = (
    "import signal, sys; from launch import data_convert as convert; from launch.cli import Parser\n"
    "if __name__ == '__main__':\n"
    "    signal.signal(signal.SIGINT, signal.default_int_handler)  # one in the background ignores it\n"
    "    convert.add_arguments(parser := Parser())\n"
    "    try:\n        sys.exit(convert.run(parser.parse_args()))\n"
    "    except KeyboardInterrupt:\n        sys.exit(130)"
)


def run(line: str) -> int:
    convert.add_arguments(parser := Parser(prog="convert"))
    return convert.run(parser.parse_args(line.split()))


def write(path: Path, count: int, **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": f"{n} " * 400} | fields) + "\n" for n in range(count)))
    return path


def test_it_says_what_it_did_and_that_there_is_nothing_to_do(tmp_path: Path, capsys):
    path = write(tmp_path / "a.jsonl", 10)
    path.write_text(path.read_text() + "{broken\n")
    (tmp_path / "b.bin").write_text("")
    line = f"{tmp_path} --to {tmp_path / 'out'} --bad-records 0.1 --workers 1 --domain web"
    assert run(line) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 10 documents, " in captured.out
    assert "skipped records: 1 not JSON" in captured.out and "a.jsonl, record 11: not JSON" in captured.out
    assert "files left out: 1 .bin" in captured.out
    assert "convert 100% of 0 MB  10 documents" in captured.err
    assert run(f"{line} --json") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert not facts["fresh"] and facts["documents"] == 10 and facts["skipped"] == {"not JSON": 1}
    assert "nothing to do, it is all there" in captured.err


def test_what_is_not_given_is_as_in_the_library(monkeypatch):
    """The command names the defaults itself, so that its help comes at once."""
    seen: list[object] = []

    def note(paths, folder, options, *, budget, **rest):
        seen.extend((options, budget))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", note)
    with pytest.raises(KeyboardInterrupt):
        run("in --to out")
    assert seen == [Options(), DataConfig().bad_records]


def test_verify_names_what_is_damaged(tmp_path: Path, capsys):
    """By the hashes of shards and indexes; a run says so of a shard of another size; both are written anew."""
    path, out = write(tmp_path / "a.jsonl", 4000, domain="web"), tmp_path / "out"
    convert_line = f"{path} --to {out} --shard-mb 1 --workers 1"
    assert run(convert_line) == 0 and cli.main(["data", "verify", str(out)]) == 0
    assert "as written: " in capsys.readouterr().out
    shards = sorted(out.glob("*.array_record"))
    assert len(shards) > 3
    flipped, cut, index = shards[0], shards[1], shards[2].with_suffix(".index.npz")
    whole = {file: file.read_bytes() for file in (flipped, cut, index)}
    flipped.write_bytes(whole[flipped][:100] + bytes([whole[flipped][100] ^ 1]) + whole[flipped][101:])
    cut.write_bytes(whole[cut][:-70_000])
    index.write_bytes(b"nothing")
    shards[3].unlink()
    assert cli.main(["data", "verify", str(out), "--json"]) == 1
    damaged = {found["file"]: found["why"] for found in json.loads(capsys.readouterr().out)["damaged"]}
    assert set(damaged) == {flipped.name, cut.name, index.name, shards[3].name}
    assert "hash differs" in damaged[flipped.name] and "bytes, not" in damaged[cut.name]
    assert cli.main(["data", "verify", str(out)]) == 1
    assert f"{out}: 4 damaged files of {len(shards)} shards" in capsys.readouterr().out
    shards[3].write_bytes(b"")
    lines: list[str] = []
    with pytest.raises(ValueError, match=rf"records are bad.*{cut.name}"):
        sources.open_sources({"x": str(out)}, epath.Path(tmp_path / "cache"), 0.0, lines.append)
    assert any(f"{cut} has" in line and "so it is damaged" in line for line in lines)
    for file in (flipped, index):
        file.unlink()
    assert run(convert_line) == 0 and cli.main(["data", "verify", str(out)]) == 0
    assert all(file.read_bytes() == content for file, content in whole.items())
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in"):
        data_verify.run(argparse.Namespace(folder=str(tmp_path), json=False))


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, monkeypatch):
    path = write(tmp_path / "a.jsonl", 10)
    with pytest.raises(ValueError, match="--beam-args are for --runner beam"):
        run(f"{path} --to {tmp_path / 'out'} --beam-args --runner=DirectRunner")
    with pytest.raises(ValueError, match="at least 1 is needed"):
        run(f"{path} --to {tmp_path / 'out'} --workers 0")
    with pytest.raises(ValueError, match="at least 1 is needed"):
        run(f"{path} --to {tmp_path / 'out'} --shard-mb 0")
    with pytest.raises(ValueError, match="is no suffix of plain text"):
        run(f"{path} --to {tmp_path / 'out'} --plain txt")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[beam\]'"):
        run(f"{path} --to {tmp_path / 'out'} --runner beam")


def test_an_error_in_a_worker_is_the_projects_own(tmp_path: Path):
    """So that the command line says it in one line: the last frame of its traceback is this project's."""
    paths = [write(tmp_path / f"{name}.jsonl", 1200, text=3) for name in "ab"]  # type: ignore
    for path in paths:
        path.write_text(path.read_text() + " " * (1 << 20))
    with pytest.raises(ValueError, match="none of the first 1000 records") as caught:
        run(f"{paths[0]} {paths[1]} --to {tmp_path / 'out'} --workers 2 --shard-mb 1")
    assert Path(caught.traceback[-1].path).is_relative_to(ROOT / "data")


def test_a_worker_killed_while_it_counts_holds_nobody_up():
    """Its lock is never released then."""
    progress = conversion._Progress((), print, 60.0)
    progress.counts.get_lock().acquire()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(progress.line()), daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert said and said[0].startswith("convert 0%")


def test_ctrl_c_leaves_nobody_behind_and_the_same_command_goes_on(tmp_path: Path, capsys):
    paths = [write(tmp_path / f"{name}.jsonl", 40_000) for name in "ab"]
    line = f"{paths[0]} {paths[1]} --to {tmp_path / 'out'} --workers 2 --shard-mb 2"
    process = subprocess.Popen([sys.executable, "-c", MAIN, *line.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    state, until = tmp_path / "out" / ".convert", time.monotonic() + 120
    while len(list(state.glob("documents-*.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert workers and not any(os.path.exists(f"/proc/{worker}/exe") for worker in workers)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(f"{line} --json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fresh"] and facts["documents"] == 80_000
