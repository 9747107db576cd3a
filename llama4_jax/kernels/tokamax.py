"""The vendor's kernel library, tokamax: imported only where one of its kernels is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import jax

VERSION = "0.0.12" if jax.__version_info__ < (0, 11) else "0.0.17"
"""Its kernels are reached by private paths and follow jax's own changes, so the version is exact; 0.0.17 is for jax
0.11, and for Python 3.12 or newer."""
INSTALL = f"pip install --no-deps tokamax=={VERSION}; pip install einshape immutabledict pydantic qwix tqdm typeguard"
LOCK = threading.RLock()
PROFILER = ("xprof", "xprof.cli", "xprof.cli.tools")


def vendor(module: str) -> ModuleType:
    """`tokamax.<module>`; ImportError, in a line that says how to install it, where it cannot be had.

    tokamax 0.0.12 asks for typeguard 2, which the command line's parser cannot live with, and typeguard 4 cannot parse
    its annotations: it is installed without its requirements, and imported with that checker switched off.
    """
    name = f"tokamax.{module}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        typeguard = importlib.import_module("typeguard")
        with LOCK, mock.patch.object(typeguard, "typechecked", lambda f: f), _without_profiler():
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this kernel needs tokamax {VERSION} ({error}): run {INSTALL}") from error


@contextmanager
def _without_profiler() -> Iterator[None]:
    """0.0.17 imports a profiler for its benchmarks, with dozens of requirements, of which no kernel knows: a stand-in
    for it, where it is not installed."""
    missing = importlib.util.find_spec(PROFILER[0]) is None
    try:
        if missing:
            sys.modules.update(dict.fromkeys(PROFILER, mock.MagicMock()))
        yield
    finally:
        for name in PROFILER if missing else ():
            sys.modules.pop(name, None)
