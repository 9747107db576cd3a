"""The script of `llama4 launch local`: what it makes of processes that fail, and of being told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.render import local
from launch.render.job import JobSpec

PROGRAM = """#!/bin/bash
if [ "$1" = status ]; then exit $(cat again); fi
echo "rank $JAX_PROCESS_ID" >> started
{body}
"""


def script(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, again: int, restarts: int = 2) -> Path:
    monkeypatch.setattr(local, "LAST_WORDS", 0.2)
    (folder / "program").write_text(PROGRAM.format(body=body))
    (folder / "program").chmod(0o755)
    (folder / "again").write_text(f"{again}\n")
    (folder / "job").write_text(
        local.render(JobSpec("a", ("train",), str(folder / "run"), processes=2, program=str(folder / "program"),
                             workdir=str(folder), restarts=restarts)).text)  # fmt: skip
    return folder / "job"


def starts(folder: Path) -> int:
    return len((folder / "started").read_text().splitlines())


def test_a_failure_ends_all_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = script(tmp_path, monkeypatch, '[ "$JAX_PROCESS_ID" = 0 ] && exec sleep 60; exit 2', again=1)
    began = time.monotonic()
    assert subprocess.run(["bash", job]).returncode == 1
    assert time.monotonic() - began < 30 and starts(tmp_path) == 2


def test_what_may_pass_is_tried_again_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = script(tmp_path, monkeypatch, "exit 70", again=0)
    assert subprocess.run(["bash", job]).returncode == 1
    assert starts(tmp_path) == 2 * 3
    (tmp_path / "started").unlink()
    job = script(tmp_path, monkeypatch, '[ "$(wc -l < started)" -gt 2 ] || exit 70', again=0)
    assert subprocess.run(["bash", job]).returncode == 0


def test_told_to_stop_it_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = "trap 'echo told >> told; exit 75' TERM; while :; do sleep 0.1; done"
    job = subprocess.Popen(["bash", script(tmp_path, monkeypatch, body, again=0)])
    while not (tmp_path / "started").exists() or starts(tmp_path) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "told").read_text() == "told\ntold\n" and starts(tmp_path) == 2
