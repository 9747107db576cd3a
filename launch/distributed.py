"""Start-up of a process of a job: who it is, whether all agree, jax.distributed; its log, and how it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from launch import place as places
from launch import preflight
from launch.place import Place
from training import exits

if TYPE_CHECKING:
    from training.config import RunConfig

WAIT = 300.0
"""Seconds to wait for the other processes, which may still be fetching an image; LLAMA4_START_TIMEOUT sets it."""
joined = False
"""Whether this process has met others by jax.distributed."""
_place: Place | None = None


def initialize(cfg: RunConfig) -> Place:
    """Join the job that this process was started in, if any; before anything touches a device.

    ValueError, in one line that names the rank and the cause, where the processes do not fit together.
    """
    global joined, _place
    if _ray_did():
        return _of_ray(cfg)
    _place = place = places.recognise()
    preflight.check_planned(place)
    if place.processes == 1:
        _check_devices(place)
        return place
    label(place)
    wait = float(os.environ.get("LLAMA4_START_TIMEOUT", WAIT))
    began = time.monotonic()
    mine = preflight.report(place, cfg.folder, dataclasses.asdict(cfg))
    hosts = preflight.meet(place, mine, wait, say)
    if place.process == 0:
        count = len(set(hosts))
        say(f"{place.processes} processes on {count} host{'s' * (count > 1)} agree ({place.how}, "
            f"{time.monotonic() - began:.1f} s)")  # fmt: skip
    import jax

    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    own = [int(i) for i in ids.split(",")] if ids else _own_devices(place)
    joined = True
    jax.distributed.initialize(place.coordinator, place.processes, place.process, own,
                               cluster_detection_method="deactivate", initialization_timeout=int(wait))  # fmt: skip
    _check_devices(place)
    return place._replace(hosts=tuple(hosts))


def who() -> str:
    """This process in words, as far as it knows itself."""
    return str(_place) if _place else f"a process on {socket.gethostname()}"


def agree(place: Place, facts: Mapping[str, str]) -> None:
    """ValueError, on every process alike, where one of them has another fact (a digest) than the first."""
    if place.processes == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    mine = [np.frombuffer(hashlib.sha256(fact.encode()).digest(), np.uint8) for fact in facts.values()]
    every = multihost_utils.process_allgather(np.stack(mine))  # [processes, facts, bytes]
    for rank, theirs in enumerate(every):
        for name, a, b in zip(facts, theirs, every[0], strict=True):
            if not np.array_equal(a, b):
                raise ValueError(f"rank {rank} has another {name} than rank 0: give every host the same")


def _own_devices(place: Place) -> list[int] | None:
    """Of the GPUs of a host, those of this process, where several processes share them."""
    hosts, processes, devices = (int(os.environ.get(f"LLAMA4_{x}", 0)) for x in ("HOSTS", "PROCESSES", "DEVICES"))
    if not hosts or processes <= hosts:
        return None
    each = devices // processes
    return list(range(place.local * each, (place.local + 1) * each))


def _check_devices(place: Place) -> None:
    """ValueError where a process sees other devices than were planned for it."""
    if planned := int(os.environ.get("LLAMA4_DEVICES", 0)):
        import jax

        each, have = planned // place.processes, jax.local_devices()
        if len(have) != each:
            raise ValueError(f"{place} has {len(have)} device{'s' * (len(have) > 1)} ({have[0].device_kind}), but "
                             f"{each} were planned for each process")  # fmt: skip


def _ray_did() -> bool:
    """Whether Ray's JaxTrainer has joined this process already."""
    return "ray" in sys.modules and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _of_ray(cfg: RunConfig) -> Place:
    """JAX has met the others already, so that digests are compared by it."""
    import jax

    place = Place("ray", "", jax.process_count(), jax.process_index(), 0, socket.gethostname())
    planned = int(os.environ.get("LLAMA4_PROCESSES", place.processes))
    if planned != place.processes:
        raise ValueError(f"{place}: Ray gave {place.processes} workers, but {planned} were planned")
    label(place)
    _check_devices(place)
    mine = preflight.report(place, cfg.folder, dataclasses.asdict(cfg))
    agree(place, {"code": mine["code"], "versions": str(mine["versions"]), "configuration": str(mine["config"])})
    if mine["unwritable"]:
        raise ValueError(f"{place} cannot write into the run's folder {cfg.folder}: {mine['unwritable']}")
    hosts = _hosts(place.host)  # once all have written
    if place.process == 0:
        preflight.unmark(cfg.folder)
    return place._replace(hosts=hosts)


def _hosts(mine: str) -> tuple[str, ...]:
    """The hosts of all processes, by JAX."""
    import numpy as np
    from jax.experimental import multihost_utils

    letters = np.frombuffer(mine.encode()[:64].ljust(64, b"\0"), np.uint8)
    every = multihost_utils.process_allgather(letters)  # [processes, letters]
    return tuple(bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(every))


# --- Its log


class _Labelled:
    """A stream whose lines begin with who wrote them."""

    def __init__(self, stream: TextIO, mark: str):
        self._stream, self._mark, self._fresh = stream, mark, True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        if lines:
            start = self._mark if self._fresh else ""
            self._stream.write(start + self._mark.join(lines))
            self._fresh = lines[-1].endswith("\n")
        return len(text)

    def isatty(self) -> bool:
        """No bar is drawn on it."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def label(place: Place) -> None:
    """Lines of this process begin with its rank; not those of the first one on a terminal, where the progress bar is.

    Open MPI makes every process believe that it has a terminal.
    """
    mark = f"[{place.process}/{place.processes} {place.host}] "
    if place.process or place.how == "mpi" or not sys.stdout.isatty():
        sys.stdout = _Labelled(sys.stdout, mark)  # type: ignore[assignment]
        sys.stderr = _Labelled(sys.stderr, mark)  # type: ignore[assignment]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def leave(status: int) -> None:
    """End a process of several that failed, at once: else it would wait in JAX for the others, which wait for it."""
    if status not in (exits.DONE, exits.STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
