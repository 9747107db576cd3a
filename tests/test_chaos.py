"""A twentieth of `make chaos`: kills and signals at random instants, files damaged, a second writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_lost():
    command = [sys.executable, "-m", "tools.chaos", "--only", "kill,term,corrupt,lock", "--share", "0.05"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
