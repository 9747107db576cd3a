"""One writer in a run's folder: a file lock where there are such, else a lease that is renewed.

The kernel gives a file lock back when its holder dies, however it dies. A store has none: there the lease says who
holds it and until when, and a holder that dies leaves it to run out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

FILE, LEASE = ".lock", "lease.json"
LASTS, SETTLES = 120.0, 2.0
"""Seconds: of a lease, and between writing one and believing it."""
RENEWALS = 3
"""Of a lease in its time."""


class RunLock:
    """Held while the block runs; BlockingIOError, naming the holder, where another process has it."""

    def __init__(self, folder: epath.Path):
        self._folder, self._file, self._lease = folder, None, None

    def __enter__(self) -> RunLock:
        trouble = None
        if jax.process_index() == 0:
            try:
                self._take()
            except OSError as error:
                trouble = error
        if jax.process_count() > 1:
            held = multihost_utils.broadcast_one_to_all(np.array(trouble is None))
            if not held:
                trouble = trouble or BlockingIOError(f"process 0 did not get the lock of {self._folder}")
        if trouble:
            raise trouble
        return self

    def check(self) -> None:
        """BlockingIOError where the lease ran out, in a pause of this process, and another one has taken it."""
        if self._lease is not None:
            self._lease.check()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
        if self._lease is not None:
            self._lease.release()

    def _take(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(self._folder, error) from error
        if "://" in str(self._folder):
            self._lease = Lease(self._folder)
            return
        import fcntl

        try:
            file = os.open(self._folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _refused(self._folder, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip()
            os.close(file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _held(self._folder, holder) from None
            self._lease = Lease(self._folder)  # a file system without locks
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"{_who()}\n".encode(), 0)
        self._file = file


class Lease:
    """Renewed by a thread some times in its time; whoever finds one that has run out takes it.

    A holder that was paused for longer than its lease does not write on: `check`, which is asked before anything is
    written, takes it anew or says who has it.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._file, self._id, self._until = folder, folder / LEASE, uuid.uuid4().hex, 0.0
        self._done, self._one = threading.Event(), threading.Lock()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="lease")
        with self._one:
            self._take()
        self._keeper.start()

    def check(self) -> None:
        """Reads nothing while the lease lasts; BlockingIOError, naming the holder, where it is another's."""
        if time.time() < self._until:
            return
        with self._one:
            if time.time() >= self._until:
                self._take()

    def release(self) -> None:
        """Give it up; nothing writes it afterwards."""
        self._done.set()
        self._keeper.join()
        held = self._read()
        if held and held["id"] == self._id:
            self._file.unlink(missing_ok=True)

    def _take(self) -> None:
        held = self._read()
        if held and held["id"] != self._id and held["until"] > time.time():
            raise _held(self._folder, held["who"])
        until = self._write()
        time.sleep(SETTLES)  # of two that began together the one that wrote last has it
        held = self._read()
        if not held or held["id"] != self._id:
            raise _held(self._folder, held["who"] if held else "another process")
        self._until = until

    def _keep(self) -> None:
        while not self._done.wait(LASTS / RENEWALS):
            with self._one, contextlib.suppress(OSError):  # a store's hiccup: there is time for another try or two
                if time.time() < self._until:  # else `check` finds out whose it is
                    self._until = self._write()

    def _write(self) -> float:
        until = time.time() + LASTS
        self._file.write_text(json.dumps(dict(id=self._id, who=_who(), until=until)))
        return until

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return None


def _refused(folder: epath.Path, error: OSError) -> OSError:
    return OSError(error.errno, f"{folder} cannot be written: {error.strerror}")


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _held(folder: epath.Path, who: str) -> BlockingIOError:
    return BlockingIOError(
        f"{folder} is being written by {who or 'another process'}: wait for it, or give another --out"
    )
