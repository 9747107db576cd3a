"""Compiling for H100s and H200s on a machine without one: a topology to lower for, and libraries told of it.

    with cross_compiling():
        compiled = jax.jit(f).lower(*arguments_on(topology(hosts=8))).compile()

It needs jax's CUDA plugin (`pip install -e '.[cuda]'`) and `JAX_PLATFORMS=cpu`, set before jax is imported, or the
plugin looks for a driver. Mosaic and Triton kernels are really compiled; cuDNN's graphs are built on a device alone,
so that neither their support nor their workspace shows here. Nothing is autotuned, and NCCL's memory is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from jax.experimental import topologies

TARGET = Path(__file__).with_name("h100_target_config.txtpb")
"""What XLA knows of an H100 SXM of 80 GB: a GpuTargetConfigProto in text form."""
KINDS: dict[str, dict[str, str]] = {
    "h100": {},
    "h200": {  # the same processor with another memory; its size as nvidia-smi has it
        "memory_bandwidth: 3352320000000": "memory_bandwidth: 4800000000000",
        "device_memory_size: 84942979072": f"device_memory_size: {143771 * 2**20}",
        "NVIDIA H100 80GB HBM3": "NVIDIA H200",
    },
}
"""What of it reads otherwise, by kind."""


def topology(hosts: int, gpus: int = 8, kind: str = "h100") -> list[Any]:
    """`hosts` nodes of `gpus` of a kind; every collective between nodes is taken for one over the network."""
    target = TARGET.read_text()
    for as_h100, here in KINDS[kind].items():
        target = target.replace(as_h100, here)
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=target, topology=f"1x{hosts}x{gpus}"
    ).devices


@contextmanager
def cross_compiling() -> Iterator[None]:
    """Within it, libraries that ask the default device (here a CPU) what it can do are answered for an H100."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def at_least(capability: str) -> bool:
        return tuple(map(int, capability.split("."))) <= (9, 0)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cudnn, "check_compute_capability", at_least))
        yield
