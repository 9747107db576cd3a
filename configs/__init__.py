"""Presets by name, `module:function`: `find("pretrain:tiny")` returns the RunConfig of that function."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from configs import ablation, codistill, distill, pretrain, pretrain_mix
from training.config import RunConfig

PRESETS: dict[str, Callable[[], RunConfig]] = {
    f"{module.__name__.removeprefix('configs.')}:{f.__name__}": f
    for module in (pretrain, pretrain_mix, codistill, distill, ablation)
    for f in module.PRESETS
}


def find(name: str) -> RunConfig:
    """The preset of that name; ValueError with the nearest one where there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3) or sorted(PRESETS)[:1]
        raise ValueError(f"no preset {name!r}; the nearest is {near[0]!r} (all: {', '.join(PRESETS)})")
    return PRESETS[name]()
