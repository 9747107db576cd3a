"""The conditions of every test: eight CPU devices, checked shapes, no silent broadcast, compilations quick and kept.

Everything is said through the environment, before jax is imported, so that the processes a test starts share it.
`JAX_PLATFORMS=cuda python -m pytest tests/...` runs the tests on a GPU instead.
"""

from __future__ import annotations

import os
import random
from importlib.metadata import version
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

DEVICES = dict(xla_force_host_platform_device_count="8")
# Tests compile for longer than they run: programs for CPUs are not optimised, which takes a third of the time.
QUICK = dict(xla_backend_optimization_level="0", xla_llvm_disable_expensive_passes="true")
if version("jaxlib").startswith("0.10."):  # 0.12 has no such flag any more
    QUICK["xla_cpu_use_fusion_emitters"] = "false"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "")
flags = DEVICES | (QUICK if os.environ["JAX_PLATFORMS"] == "cpu" else {})
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{flag}={to}" for flag, to in flags.items() if flag not in given)])
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The annotations of these packages are checked at every call, array shapes included.
jaxtyping.install_import_hook(["llama4_jax", "training", "data", "configs", "launch"], "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeds():
    """The global generators start alike in every test, whatever ran before it and on whichever worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
