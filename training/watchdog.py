"""A process that makes no progress ends, and says where it stood; one that fails among several ends soon.

JAX declares a process dead that stops answering, but one that answers and does not move holds up the whole job for
ever, and one whose peer has died waits for it when it exits. A thread watches over both.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from training import exits, status

COMPILES = 1800.0
"""Least seconds for what may compile."""
ENDS = 10.0
"""Seconds that a process of several has to end by itself after an error."""
BEAT = 30.0
"""Seconds between a process's heartbeats in the run's folder, or a quarter of what the watchdog waits."""


class Watchdog:
    """Watches the block: `beat` says that something was done, and how long the next may take.

    Every process keeps `heartbeats/PROCESS.json` in the run's folder, by which the one that others wait for is found.
    """

    def __init__(self, folder: epath.Path, seconds: int):
        """`seconds` without a beat after which the process ends; 0: never."""
        self._folder, self._seconds = folder / status.HEARTBEATS, seconds
        self._step, self._what, self._done = 0, "starting", threading.Event()
        self._deadline = self._now = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat(0, "starting", compiles=True)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:
            self._done.set()
        else:  # on its way out this process will wait for the others, which may be gone
            self._what, self._deadline = f"ending after {kind.__name__}", time.monotonic() + ENDS
            self._seconds = self._seconds or int(ENDS)

    def beat(self, step: int, what: str, compiles: bool = False) -> None:
        """After `step` steps this process begins to do `what`."""
        self._step, self._what, self._now = step, what, time.monotonic()
        self._deadline = self._now + (max(self._seconds, COMPILES) if compiles else self._seconds)

    def _watch(self) -> None:
        pause = min(BEAT, (self._seconds or 4 * BEAT) / 4, ENDS / 4)
        wrote = 0.0
        while not self._done.wait(pause):
            if time.monotonic() - wrote > min(BEAT, (self._seconds or 4 * BEAT) / 4):
                wrote = time.monotonic()
                with contextlib.suppress(OSError):  # what matters is the run
                    self._write()
            if self._seconds and time.monotonic() > self._deadline:
                self._end()

    def _write(self) -> None:
        if not self._folder.parent.exists():  # nothing is kept of a run that has not begun
            return
        self._folder.mkdir(exist_ok=True)
        who = dict(process=jax.process_index(), host=socket.gethostname(), pid=os.getpid())
        now = dict(**who, step=self._step, what=self._what, time=round(time.time(), 3),
                   for_seconds=round(time.monotonic() - self._now, 1))  # fmt: skip
        (self._folder / f"{jax.process_index()}.json").write_text(json.dumps(now) + "\n")

    def _end(self) -> None:
        waited = time.monotonic() - self._now
        if self._what.startswith("ending"):
            os.write(2, f"\nllama4: process {jax.process_index()} ends without waiting for the others\n".encode())
            sys.stdout.flush()
            os._exit(exits.FAILED)
        try:
            lines = [f"llama4: process {jax.process_index()}: nothing for {waited:.0f} s while {self._what} after step "
                     f"{self._step} (safety.stuck_after {self._seconds:.0f}); its stacks follow, and it ends",
                     *(f"llama4: {line}" for line in self._others())]  # fmt: skip
            os.write(2, ("\n" + "\n".join(lines) + "\n").encode())
            faulthandler.dump_traceback(all_threads=True)
        finally:  # whatever is the matter with the heartbeats or with stderr
            os._exit(exits.LOST)

    def _others(self) -> Iterator[str]:
        """Which processes are behind, by their heartbeats."""
        try:
            beats = status.heartbeats(self._folder.parent)
        except OSError:
            return
        for beat in sorted(beats, key=lambda b: (b["step"], b["time"]))[:4]:
            silent = time.time() - beat["time"]
            yield (f"process {beat['process']} on {beat['host']} (pid {beat['pid']}): {beat['what']} after step "
                   f"{beat['step']}, last heard of {silent:.0f} s ago")  # fmt: skip
