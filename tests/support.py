"""What tests of several folders share: the command line in this process, several processes, servers in threads."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch import cli
from training.serve import Server

ROOT = Path(__file__).resolve().parent.parent


def output(line: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON that a command prints on stdout, which holds nothing else."""
    assert cli.main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr of a command that refuses."""
    assert cli.main(line.split()) == 2
    return capsys.readouterr().err.splitlines()[-1]


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many CPU devices, and what tests have else."""
    flag = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{flag}=\d+", f"{flag}={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_processes(processes: int, program: str, *arguments: object) -> list[str]:
    """What each of the processes of one job prints, which share eight devices.

    The program finds the coordinator's address, the number of processes, its own and the arguments in `sys.argv`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command, env = [sys.executable, "-c", program, address, str(processes)], environment(8 // processes)
    started = [
        subprocess.Popen([*command, str(i), *map(str, arguments)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    outputs = [p.communicate(timeout=600)[0] for p in started]
    assert not any(p.returncode for p in started), outputs
    return outputs


@contextmanager
def running(server: Server) -> Iterator[None]:
    """In a thread, until the block ends: it stops as after a signal, or was killed before."""
    thread, listening = threading.Thread(target=server.run), threading.Event()
    server.log = lambda line: listening.set()
    thread.start()
    try:
        assert listening.wait(30)
        yield
    finally:
        server.stopping.set()
        thread.join(30)
        assert not thread.is_alive()


def kill(server: Server) -> None:
    """As a dying process does: all sockets are gone at once."""
    server.stopping.set()
    for client in list(server.clients):
        client.transport.close()
