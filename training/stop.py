"""Being told to stop: SIGTERM and SIGINT, at whatever a run is doing, on one process or on many.

SIGUSR2 is SIGTERM by another name: launchers that end their processes at SIGTERM hand it on and wait, as mpirun does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from training import exits
from training.status import STOPPED

NAMES: dict[int, signal.Signals] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR2: signal.SIGTERM,
}
"""Signals that tell a run to stop, each by the name it is known by here."""


class Stop:
    """The first signal asks for a checkpoint and the end after the step under way; the second ends the process at once.

    A thread receives them, so that neither a compilation nor a wait for devices holds them up. With several processes
    JAX agrees with all of them on the step after which they stop, once any of them was told.
    """

    signal: int | None = None

    def __init__(self, folder: epath.Path):
        self._folder, self._told, self._asked = folder, 0, 0
        self._nothing_to_save, self._theirs = False, None

    def __enter__(self) -> Stop:
        self._before: dict[int, Any] = {}
        self._wakes: socket.socket | None = None
        if threading.current_thread() is not threading.main_thread():
            return self
        # Several processes: JAX's own handler starts the agreement, and is called once ours has seen the signal.
        several = jax.process_count() > 1
        self._theirs = _c_handler() if several else None
        self._wakes, wake = socket.socketpair()
        wake.setblocking(False)
        self._wake, self._wake_before = wake, signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._wakes,), daemon=True, name="signals").start()
        self._before = {s: signal.signal(s, self._note) for s in NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # JAX's is not Python's
                signal.signal(number, handler)
            elif self._theirs:
                ctypes.pythonapi.PyOS_setsig(int(number), ctypes.c_void_p(self._theirs))
        if self._wakes:
            signal.set_wakeup_fd(self._wake_before)
            self._wake.close()

    def requested(self) -> bool:
        """Whether to stop here; the same answer on every process, all of which must ask at the same places."""
        self._asked += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """While the block runs, as the first compilation does, a signal ends the process at once: the newest
        checkpoint, if there is one, is all there is."""
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def mark(self, step: int | None) -> None:
        """Leave the marker; `step` is that of the checkpoint, None where none was written."""
        facts = dict(step=step, signal=signal.Signals(self.signal or signal.SIGTERM).name, time=round(time.time(), 3))
        (self._folder / STOPPED).write_text(json.dumps(facts) + "\n")

    def _note(self, number: int, _: Any) -> None:
        if jax.process_count() == 1:
            self.signal = self.signal or NAMES[number]

    def _listen(self, wakes: socket.socket) -> None:
        while received := wakes.recv(1):
            if received[0] in NAMES:
                self._receive(NAMES[received[0]])
        wakes.close()

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        self._told += 1
        if self._told > 1:
            os.write(2, f"\n{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        if self._nothing_to_save and number == signal.SIGTERM:
            os.write(2, f"\n{name}: nothing to save, stopping at once\n".encode())
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self.mark(None)
            os._exit(exits.STOPPED)
        self._note(number, None)
        text = f"\n{name}: stopping after this step, with a checkpoint; again to stop at once\n"
        os.write(2, text.encode())
        if self._theirs:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(self._theirs)(int(signal.SIGTERM))


def _c_handler() -> Any:
    """The address of SIGTERM's handler, if it is neither the default nor to ignore it."""
    get = ctypes.pythonapi.PyOS_getsig
    get.restype = ctypes.c_void_p
    found = get(int(signal.SIGTERM))
    return found if found and found > 1 else None
