"""What is installed on a host, what it has, and how fast that is: matmuls, memory, collectives, storage."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from training.chips import chip_of, peak_flops

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu", "jax-cuda13-plugin",
             "tokamax", "qwix")  # fmt: skip
SHOWN = ("JAX_", "XLA_", "NCCL_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "LLAMA4_")
SIZES = {"cpu": (1024, 64 << 20, 4 << 20, 64 << 20), "gpu": (8192, 1 << 30, 64 << 20, 1 << 30),
         "tpu": (8192, 1 << 30, 64 << 20, 1 << 30)}  # fmt: skip
"""By platform: a matmul's width; bytes of memory, of a shard that is gathered, and of storage."""
AHEAD = 32
"""Calls of an accelerator that are under way before one is waited for: the host's own time, up to two milliseconds in a
virtual machine, is then not the device's."""
LOW = 0.5
"""Of a data sheet's figure, below which something is amiss."""


def examine(mesh: Mesh, folder: str = "", seconds: float = 1.0) -> dict[str, Any]:
    """Facts as plain data. Rates are medians over about `seconds` each: of one device in FLOP/s and bytes a second, of
    a collective the bytes that each device receives, of storage this process's alone."""
    device = jax.local_devices()[0]
    width, memory, shard, storage = SIZES.get(device.platform, SIZES["gpu"])
    chip = chip_of(device.device_kind)
    sheet = {"matmul": peak_flops(device.device_kind), "memory": chip.hbm_rate / chip.devices if chip else None}
    measured = {"matmul": matmul(width, seconds), "memory": copy(memory, seconds)}
    return dict(
        versions={"python": platform.python_version()} | {n: v for n in LIBRARIES if (v := _version(n))},
        host=dict(name=socket.gethostname(), cores=os.cpu_count(), memory=_memory(),
                  files=resource.getrlimit(resource.RLIMIT_NOFILE)[0], driver=bool(shutil.which("nvidia-smi")),
                  proxies=sorted(n for n in os.environ if n.lower().endswith("_proxy"))),
        variables={n: v for n, v in sorted(os.environ.items()) if n.startswith(SHOWN)},
        devices=dict(count=jax.device_count(), here=jax.local_device_count(), processes=jax.process_count(),
                     kind=device.device_kind, platform=device.platform, memory=_device_memory(device)),
        rates={name: dict(value=value, sheet=sheet[name], share=value / peak if (peak := sheet[name]) else None)
               for name, value in measured.items()},
        collectives={name: gather(mesh, name, shard, seconds) for name, size in mesh.shape.items() if size > 1},
        storage=disk(folder, storage) if folder else None,
    )  # fmt: skip


def matmul(width: int, seconds: float) -> float:
    """FLOP/s of [width, width] x [width, width] in bfloat16, the sums in float32; of random numbers, since chips draw
    less power, and run faster, on equal ones."""
    x, y = (jax.random.normal(jax.random.key(i), (width, width), jnp.bfloat16) for i in range(2))
    call = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16))
    return 2 * width**3 / _time(lambda: call(x, y), seconds)


def copy(size: int, seconds: float) -> float:
    """Bytes a second, read and written, of an array of `size` bytes."""
    step = jax.jit(lambda a: a + 1, donate_argnums=0)
    held = [jnp.zeros(size // 4, jnp.float32)]

    def call() -> jax.Array:
        held[0] = step(held[0])  # in place: many calls under way take no more memory than one
        return held[0]

    return 2 * size / _time(call, seconds)


def gather(mesh: Mesh, axis: str, shard: int, seconds: float) -> float:
    """Bytes a second that each device receives in an all-gather of `shard` bytes of each along an axis."""
    ways = mesh.shape[axis]
    spec = NamedSharding(mesh, P(mesh.axis_names))
    local = np.zeros(shard // 4, np.float32)
    x = jax.make_array_from_callback((mesh.size * len(local),), spec, lambda _: local)

    @partial(jax.shard_map, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names), check_vma=False)
    def call(part):
        whole = jax.lax.all_gather(part, axis)
        return whole.sum(axis=0)[:1]

    compiled = jax.jit(call)
    return (ways - 1) * shard / _time(lambda: compiled(x), seconds)


def disk(folder: str, size: int) -> dict[str, Any]:
    """Bytes a second to and from a file in a folder; what is read may come out of a cache of the host's."""
    place = epath.Path(folder)
    file = place / f".doctor-{secrets.token_hex(8)}"  # hosts of a job do this at once, perhaps with equal pids
    content = np.random.default_rng(0).bytes(size)
    fresh = not place.exists()
    try:
        place.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        file.write_bytes(content)
        if "://" not in folder:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        wrote = time.perf_counter()
        same = file.read_bytes() == content
        read = time.perf_counter()
    except OSError as error:
        raise ValueError(f"cannot measure the storage of {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            if fresh:
                place.rmdir()
    if not same:
        raise ValueError(f"{folder} gave back other bytes than were written")
    return dict(folder=folder, bytes=size, write=size / (wrote - began), read=size / (read - wrote))


def advice(found: dict[str, Any], pins: Path | None = None) -> list[str]:
    """What to look after, the most costly first."""
    host, device = found["host"], found["devices"]
    return [*_devices(host, device), *_rates(found), *_versions(found["versions"], pins), *_host(host, device)]


def _devices(host: dict[str, Any], device: dict[str, Any]) -> Iterator[str]:
    if device["platform"] == "cpu" and host["driver"]:
        yield "an NVIDIA driver is here, but JAX sees CPUs alone: install the extra cuda"
    if device["platform"] == "cpu" and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()):
        yield "TPUs are here, but JAX sees CPUs alone: install the extra tpu; or another process holds them"
    if device["count"] != device["here"] * device["processes"]:
        yield (f"{device['count']} devices of {device['processes']} processes, of which {device['here']} are here: "
               "hosts are unequal")  # fmt: skip


def _rates(found: dict[str, Any]) -> Iterator[str]:
    for name, rate in found["rates"].items():
        if rate["share"] is not None and rate["share"] < LOW:
            yield (f"{name} at {rate['share']:.0%} of the data sheet: another process on the device, a power cap, or a "
                   "throttled one")  # fmt: skip
    storage = found["storage"]
    if storage and storage["write"] < 100e6:
        yield f"{storage['folder']} takes {storage['write'] / 1e6:.0f} MB/s: saves will hold up steps"


def _versions(versions: dict[str, str], pins: Path | None) -> Iterator[str]:
    tested = (
        dict(re.findall(r"^([\w.-]+)==([\w.]+)$", pins.read_text(), re.MULTILINE)) if pins and pins.exists() else {}
    )
    for name, version in versions.items():
        if tested.get(name, version) != version:
            yield f"{name} is {version}, tested with {tested[name]} (constraints.txt)"


def _host(host: dict[str, Any], device: dict[str, Any]) -> Iterator[str]:
    if host["files"] < 4096:
        yield f"a process may open {host['files']} files, few for checkpoints: ulimit -n 65536"
    if host["proxies"]:
        yield f"{', '.join(host['proxies'])} set: jax.distributed may hang behind a proxy; unset for training"
    if device["platform"] == "gpu" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        yield "JAX takes 75% of a GPU's memory: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"


def _time(call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(call())
    ahead = 1 if jax.default_backend() == "cpu" else AHEAD
    times, until = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        for _ in range(ahead):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / ahead)
        if jax.process_count() > 1 and len(times) == 3:  # all processes make as many calls
            break
    return statistics.median(times)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_memory(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")
