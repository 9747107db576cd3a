"""What moving a model's bytes needs, whatever its size: a bound on memory, threads, a journal, progress.

Work is cut into pieces that take their memory out of one `Budget`. What is done is noted in a `Journal` after it is on
the disk, so that after a kill, or a power cut, the same command goes on behind it.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from etils import epath

SYNC_BYTES = 2**29
"""So much is written before the journal says so, and what comes while it does: what a kill can cost."""
LEAST = 2**28
"""Below this a budget is of no use."""


def resident() -> int:
    """Bytes of this process in memory, as the operating system counts them."""
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: its largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def parse_bytes(text: str) -> int:
    """`2GB`, `512MB` or a number of bytes; ValueError says what is taken."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    number = text.upper().rstrip("BKMGT")
    unit = text.upper()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"a size is a number with KB, MB, GB or TB, such as 2GB, not {text!r}") from None


class Budget:
    """Bytes that pieces may hold together: what `max_memory` leaves beside the process as it is."""

    def __init__(self, max_memory: int):
        """ValueError if that is less than the process with `LEAST` needs."""
        self.total = self.free = max_memory - resident()
        if self.total < LEAST:
            need = -(-(resident() + LEAST) // 10**8) / 10
            raise ValueError(f"--max-memory {max_memory / 1e9:.2f}GB is too little: the least is {need:.1f}GB")
        self._changed = threading.Condition()

    def check(self, nbytes: int, what: str) -> None:
        """ValueError where so much cannot be had at all."""
        if nbytes > self.total:
            need = -(-(nbytes + resident()) // 10**8) / 10
            raise ValueError(f"{what} needs more memory than --max-memory leaves: give {need:.1f}GB or more")

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self.free >= nbytes)
            self.free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self.free += nbytes
                self._changed.notify_all()


def run_all(jobs: Iterable[Callable[[], None]], threads: int) -> None:
    """All of them, in threads; the first error, or Ctrl-C, keeps those that have not begun from beginning."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failed := [f for f in done if f.exception() is not None]:
            pool.shutdown(wait=False, cancel_futures=True)
            failed[0].result()


class Journal:
    """What is done, by name, in a file of JSON lines; a line that a kill cut short does not count."""

    def __init__(self, file: epath.Path, sync: Callable[[list[dict[str, Any]]], object]):
        """`sync` brings what entries speak of onto the disk; where it raises nothing more is noted."""
        self._file, self._sync = file, sync
        self._pending: list[dict[str, Any]] = []
        self._bytes, self._lock, self._writing, self._failed = 0, threading.Lock(), threading.Lock(), False
        self.done: dict[str, dict[str, Any]] = read_journal(file)
        if file.exists():  # lines are added behind the last whole one
            text = file.read_text()
            os.truncate(file, len(text[: text.rfind("\n") + 1].encode()))

    def add(self, name: str, nbytes: int, **entry: Any) -> None:
        """`nbytes` more were written, and with them this is true."""
        with self._lock:
            self._pending.append({"name": name, **entry})
            self._bytes += nbytes
            due = self._bytes >= SYNC_BYTES
            self._bytes = 0 if due else self._bytes
        if due:
            self.flush()

    def flush(self) -> None:
        with self._writing:  # in order; meanwhile others go on to add
            with self._lock:
                entries, self._pending, self._bytes = self._pending, [], 0
            if self._failed or not entries:
                return
            self._failed = True  # until all of it is there: a later entry may speak of the same bytes
            self._sync(entries)
            with open(self._file, "a") as f:
                f.write("".join(json.dumps(entry) + "\n" for entry in entries))
                f.flush()
                os.fsync(f.fileno())
            self._failed = False


def read_journal(file: epath.Path) -> dict[str, dict[str, Any]]:
    """The last entry of each name."""
    done: dict[str, dict[str, Any]] = {}
    for line in file.read_text().split("\n")[:-1] if file.exists() else ():
        entry = json.loads(line)
        done[entry["name"]] = entry
    return done


@contextmanager
def workplace(work: epath.Path, plan: dict[str, Any]) -> Iterator[None]:
    """A local folder beside the goal, kept from one attempt to the next if the plan is the same, else made anew.

    ValueError if another process is at work in it.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = open(work.with_name(f"{work.name}.lock"), "w")  # noqa: SIM115
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing {work}: wait for it, or stop it") from None
        file, text = work / "plan.json", json.dumps(plan, sort_keys=True)
        if work.exists() and not (file.exists() and file.read_text() == text):
            work.rmtree()
        if not work.exists():
            work.mkdir(parents=True)
            file.write_text(text)
        yield
        os.unlink(lock.name)
    finally:
        lock.close()


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """All of it: the system may write less at once."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + 2**30], offset + done)


def fsync(files: Iterable[epath.Path]) -> None:
    """Local files, and that they are in their folders, onto the disk; OSError where that failed."""
    files = list(files)
    for path in [*files, *dict.fromkeys(file.parent for file in files)]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def power_of_two(most: int) -> int:
    """The largest one that is no more."""
    return 1 << (most.bit_length() - 1)


def check_space(folder: epath.Path, nbytes: int) -> None:
    """ValueError if the disk that will hold `folder` has less room."""
    if "://" in os.fspath(folder):
        return
    place = folder
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < nbytes:
        raise ValueError(f"{folder} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")


class Progress:
    """Bytes, speed and time left: a line that renews itself on a terminal, elsewhere one every ten seconds."""

    def __init__(self, what: str, total: int, done: int = 0, log: Callable[[str], object] | None = None):
        self._what, self._total, self._done, self._begun = what, total, done, done
        self._start = self._last = time.monotonic()
        self._log, self._tty = log, log is None and sys.stderr.isatty()
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last >= (0.2 if self._tty else 10):
                self._last = now
                self._print("\r" if self._tty else "\n")

    def close(self) -> None:
        if self._tty:
            self._print("\n")

    def line(self) -> str:
        rate = (self._done - self._begun) / max(time.monotonic() - self._start, 1e-6)
        left = int((self._total - self._done) / rate) if rate else 0
        return (
            f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )

    def _print(self, end: str) -> None:
        if self._log:
            self._log(self.line())
        else:
            print(self.line(), end=end, file=sys.stderr, flush=True)
