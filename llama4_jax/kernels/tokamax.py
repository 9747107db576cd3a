"""The vendor's kernel library, tokamax: imported only where one of its kernels is chosen."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from unittest import mock

VERSION = "0.0.12"
"""Its kernels are reached by private paths, so the version is exact."""
INSTALL = f"pip install --no-deps tokamax=={VERSION}; pip install einshape immutabledict pydantic qwix tqdm typeguard"


def vendor(module: str) -> ModuleType:
    """`tokamax.<module>`; ImportError, in a line that says how to install it, where it cannot be had.

    tokamax asks for typeguard 2, which the command line's parser cannot live with, and typeguard 4 cannot parse its
    annotations: it is installed without its requirements, and imported with that checker switched off.
    """
    name = f"tokamax.{module}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        typeguard = importlib.import_module("typeguard")
        with mock.patch.object(typeguard, "typechecked", lambda f: f):
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this kernel needs tokamax {VERSION} ({error}): run {INSTALL}") from error
