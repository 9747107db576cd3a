"""Traces of some steps, on demand: asked for before a run, or of a running one by SIGUSR1. xprof reads them.

The first process traces itself and its devices, into `profile/` of the run's folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

STEPS = 3
"""Of a trace that a signal asks for."""
_active: list[Profiler] = []


class Profiler:
    """Traces steps `first` to `last`, and after a signal the next ones; none where `first` is 0 and no signal comes."""

    def __init__(self, folder: str, first: int = 0, last: int = 0, say: Callable[[str], object] = print):
        self._folder, self._say = epath.Path(folder) / "profile", say
        self._first, self._last = first, last
        self._into: Path | None = None
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Profiler:
        _active.append(self)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
        self._stop()

    def after(self, step: int) -> None:
        """A step is done."""
        if self._into and step >= self._last:
            self._stop()
        if self._asked and not self._into:
            self._first, self._last, self._asked = step + 1, step + STEPS, False
        if not self._into and self._first <= step + 1 <= self._last:
            self._into = Path(tempfile.mkdtemp(prefix="llama4-profile-"))
            jax.profiler.start_trace(self._into)

    def _ask(self, *_: object) -> None:
        os.write(2, b"\nSIGUSR1: tracing the next steps\n")
        self._asked = True

    def _stop(self) -> None:
        if not self._into:
            return
        jax.profiler.stop_trace()
        made, self._into = self._into, None
        files = [file for file in sorted(made.rglob("*")) if file.is_file()]
        for file in files:
            *above, session, name = file.relative_to(made).parts  # the session is named by the second it began in
            to = self._folder.joinpath(*above, f"{session}_steps_{self._first}-{self._last}", name)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
        shutil.rmtree(made)
        self._say(f"steps {self._first} to {self._last} are traced: xprof --logdir {self._folder} shows them")


def after(step: int) -> None:
    """A step is done, for the profiler that there is, if any."""
    for profiler in _active:
        profiler.after(step)


def parse(asked: str) -> tuple[int, int]:
    """steps=10-12, or steps=10."""
    found = re.fullmatch(r"steps=(\d+)(?:-(\d+))?", asked)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile takes steps=FIRST-LAST, e.g. steps=10-12, not {asked!r}")
    return first, last
