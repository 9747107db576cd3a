"""Before jax.distributed: every process of a job reports to the first one, which compares, and answers all.

What JAX's own start-up meets in silence, for minutes, is said here in a line that names the rank and the cause: a
coordinator that cannot be found, a rank that is missing or there twice, other code, another configuration, a run's
folder that is not shared. The exchange is one line of JSON each way, on the coordinator's port before JAX takes it;
like JAX's it trusts the network that it is on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.place import Place
from training import exits

PACKAGES = ("llama4_jax", "training", "data", "configs", "launch")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SAY = 10.0
"""Seconds between lines about what is waited for."""
LINGER = 3.0
"""Seconds in which the first process tells late ones why it ends."""
LONGEST = 1 << 20
FOLDER = ".preflight"


class Late(ConnectionError):
    """A process did not come, or cannot be reached: another start may go better."""

    status = exits.LOST


def check_planned(place: Place, env: Mapping[str, str] = os.environ) -> None:
    """ValueError where the launcher started other processes than were planned, or where they cannot meet."""
    planned = int(env.get("LLAMA4_PROCESSES", place.processes))
    if planned != place.processes:
        raise ValueError(f"{place}: {place.processes} process{'es' * (place.processes > 1)} started ({place.how}), but "
                         f"{planned} were planned: launch the job again with the hosts that there are")  # fmt: skip
    if place.processes == 1:
        return
    host = place.coordinator.rpartition(":")[0].strip("[]")
    hosts = int(env.get("LLAMA4_HOSTS", 1))
    if hosts > 1 and (host == "localhost" or host.startswith("127.") or host == "::1"):
        raise ValueError(f"{place}: the coordinator {place.coordinator} is every host's own loopback, which the others "
                         f"of {hosts} hosts cannot reach: give the first one's name")  # fmt: skip
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(f"{place}: the coordinator's name {host!r} cannot be resolved: {error.strerror}") from error


def report(place: Place, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a process says of itself; it leaves a file of its own in the run's folder."""
    found = dict(process=place.process, processes=place.processes, host=place.host, code=code(), versions=versions(),
                 config=dict(_flat(config)), folder=folder)  # fmt: skip
    return found | _mark(place, folder)


def code() -> str:
    """Digest of this project's sources."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what is computed."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def meet(place: Place, mine: dict[str, Any], wait: float, say: Callable[[str], object]) -> list[str]:
    """The hosts of all processes, once they are there and agree; ValueError, the same for all, where they do not."""
    if place.process == 0:
        return _first(place, mine, wait, say)
    address, port = place.coordinator.rpartition(":")[0].strip("[]"), int(place.coordinator.rpartition(":")[2])
    deadline, told = time.monotonic() + wait, time.monotonic()
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as link:
                link.settimeout(max(1.0, deadline - time.monotonic()) + LINGER)
                link.sendall(json.dumps(mine | {"clock": time.time()}).encode() + b"\n")
                answer = json.loads(_line(link))
                break
        except ValueError:
            raise ValueError(f"{place}: {place.coordinator} answered, but not as the first process does: another "
                             "program's port, or a job that has begun already") from None  # fmt: skip
        except OSError as error:
            if time.monotonic() > deadline:
                raise Late(f"{place} could not reach the first process at {place.coordinator} within {wait:.0f} s: "
                                 f"{error.strerror or error}") from error  # fmt: skip
            if time.monotonic() - told > SAY:
                told = time.monotonic()
                say(f"waiting for the first process at {place.coordinator}: {error.strerror or error}")
            time.sleep(0.25)
    if answer.get("error"):
        raise (Late if answer.get("late") else ValueError)(answer["error"])
    return answer["hosts"]


def _first(place: Place, mine: dict[str, Any], wait: float, say: Callable[[str], object]) -> list[str]:
    """What the first process does: it gathers the reports, compares them and answers them all alike."""
    port = int(place.coordinator.rpartition(":")[2])
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET,
                                      dualstack_ipv6=both, backlog=4096)  # fmt: skip
    except OSError as error:
        raise ValueError(f"{place} cannot listen on port {port}: {error.strerror}; another job there? "
                         "--port gives it another") from error  # fmt: skip
    links: list[socket.socket] = []
    with server:
        try:
            reports, wrong = _gather(server, links, place, mine, wait, say)
            wrong = wrong or compare(reports) or _unshared(reports)  # of those that came
            hosts = [str(reports[i]["host"]) for i in sorted(reports)]
            late = not wrong and len(reports) < place.processes
            if late:
                wrong = _missing(reports, place, wait)
            answer = json.dumps({"error": wrong, "late": late, "hosts": hosts}).encode() + b"\n"
            for link in links:
                _answer(link, answer)
            if wrong:
                _tell_late_ones(server, answer)
                raise (Late if late else ValueError)(wrong)
            for link in links:  # they close first, so that the port is free at once
                _drain(link)
        finally:
            for link in links:
                link.close()
            unmark(mine["folder"])
    return hosts


def _gather(server: socket.socket, links: list[socket.socket], place: Place, mine: dict[str, Any], wait: float,
            say: Callable[[str], object]) -> tuple[dict[int, dict[str, Any]], str]:  # fmt: skip
    """(reports by rank, what is wrong already)."""
    reports, began = {0: mine | {"skew": 0.0}}, time.monotonic()
    told = began
    server.settimeout(0.5)
    while len(reports) < place.processes:
        missing = [i for i in range(place.processes) if i not in reports]
        if (waited := time.monotonic() - began) > wait:
            return reports, ""
        if time.monotonic() - told > SAY:
            told = time.monotonic()
            say(f"waiting for {_ranks(missing)} of {place.processes} ({waited:.0f} s)")
        try:
            link, _ = server.accept()
            link.settimeout(5)
            theirs = json.loads(_line(link))
            rank = int(theirs["process"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # nobody, or somebody else
        links.append(link)
        who = f"rank {rank} ({theirs['host']})"
        if theirs["processes"] != place.processes:
            return reports, (f"{who} counts {theirs['processes']} processes, rank 0 ({place.host}) counts "
                             f"{place.processes}: hosts of two jobs, or a wrong number")  # fmt: skip
        if rank in reports:
            return (
                reports,
                f"{who} came twice, the first time from {reports[rank]['host']}: each rank is of one process",
            )
        reports[rank] = theirs | {"skew": theirs["clock"] - time.time()}
    return reports, ""


def compare(reports: Mapping[int, Mapping[str, Any]]) -> str:
    """What is wrong between a rank and the first, in a line; empty where nothing is."""
    from training.status import SKEW

    first = reports[0]
    zero = f"rank 0 ({first['host']})"
    for rank, theirs in sorted(reports.items()):
        who = f"rank {rank} ({theirs['host']})"
        if theirs["unwritable"]:
            return f"{who} cannot write into the run's folder {theirs['folder']}: {theirs['unwritable']}"
        for name, has in theirs["versions"].items():
            if has != first["versions"].get(name):
                return f"{who} has {name} {has}, {zero} has {first['versions'].get(name)}: install the same everywhere"
        if theirs["code"] != first["code"]:
            return f"{who} runs other code ({theirs['code']}) than {zero} ({first['code']}): update the checkout there"
        for name in sorted({*theirs["config"], *first["config"]}):
            has, wants = (of["config"].get(name, "missing") for of in (theirs, first))
            if has != wants:
                return f"{who} has another configuration: {name} is {has!r}, but {wants!r} of {zero}"
        if abs(theirs["skew"]) > SKEW:
            how = "ahead of" if theirs["skew"] > 0 else "behind"
            return f"{who}: its clock is {abs(theirs['skew']):.0f} s {how} that of {zero}: set both by NTP"
    return ""


# --- The run's folder


def _mark(place: Place, folder: str) -> dict[str, str]:
    from etils import epath

    name = f"{place.process}-{secrets.token_hex(4)}"
    try:
        marks = epath.Path(folder) / FOLDER
        marks.mkdir(parents=True, exist_ok=True)
        (marks / name).write_text("")
    except OSError as error:
        return {"mark": name, "unwritable": error.strerror or str(error)}
    return {"mark": name, "unwritable": ""}


def _unshared(reports: Mapping[int, Mapping[str, Any]]) -> str:
    """The first rank whose file the first process does not see."""
    from etils import epath

    marks = epath.Path(reports[0]["folder"]) / FOLDER
    for rank, theirs in sorted(reports.items()):
        if not (marks / theirs["mark"]).exists():
            return (f"rank {rank} ({theirs['host']}) wrote into the run's folder {theirs['folder']}, but rank 0 "
                    f"({reports[0]['host']}) does not see it: the folder is not shared")  # fmt: skip
    return ""


def unmark(folder: str) -> None:
    """Take away what `report` left in the folder, of all processes."""
    from etils import epath

    with contextlib.suppress(OSError):  # it is hidden, and the next start's
        (epath.Path(folder) / FOLDER).rmtree(missing_ok=True)


# --- Sockets


def _line(link: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        part = link.recv(65536)
        if not part or len(found) > LONGEST:
            raise OSError("closed before it answered")
        found += part
    return found


def _answer(link: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # who is gone will be missed soon enough
        link.sendall(answer)


def _drain(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.settimeout(2)
        while link.recv(4096):
            pass


def _tell_late_ones(server: socket.socket, answer: bytes) -> None:
    until = time.monotonic() + LINGER
    while (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            link, _ = server.accept()
            with link:
                link.settimeout(1)
                _line(link)
                link.sendall(answer)
        except OSError:
            pass


def _flat(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [pair for key, child in node.items() for pair in _flat(child, f"{path}.{key}" if path else str(key))]
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [pair for i, child in enumerate(node) for pair in _flat(child, f"{path}.{i}")]
    return [(path, node)]


def _missing(reports: Mapping[int, Any], place: Place, wait: float) -> str:
    missing = [i for i in range(place.processes) if i not in reports]
    return (f"{_ranks(missing)} of {place.processes} did not come within {wait:.0f} s: look at the log of that host, "
            "or whether it was started")  # fmt: skip


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
