"""Two checkpoints side by side: configuration, place in the data, and arrays, bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from training.checkpoint import Checkpoints
from training.record import changed


def differences(first: tuple[str, int], second: tuple[str, int]) -> dict[str, Any]:
    """Of two (run's folder, step): equal; lines about config, data and shapes; arrays that differ, by name: entries
    (how many differ), size, relative (norm of the difference over that of the first); same (how many arrays are equal).

    One array of each is held at a time. `training.checkpoint.Damaged` where one is not what was written.
    """
    with Checkpoints(first[0]) as a, Checkpoints(second[0]) as b:
        records, places = (tuple(read(at) for read, at in ((x, first[1]), (y, second[1])))
                           for x, y in ((a.record, b.record), (a.place, b.place)))  # fmt: skip
        shapes = a.shapes(first[1]), b.shapes(second[1])
        known = [{name: f"{of.dtype}{list(of.shape)}" for name, of in side.items()} for side in shapes]
        alike = [name for name in known[0] if known[0][name] == known[1].get(name)]
        arrays = {}
        for name in alike:
            x, y = (_read(side, step, name, of[name]) for side, (_, step), of in zip((a, b), (first, second), shapes,
                                                                                       strict=True))  # fmt: skip
            if x.tobytes() != y.tobytes():
                arrays[name] = _apart(x, y)
    config, data, different = _lines(*records), _lines(*places), _lines(*known)
    equal = not (config or data or different or arrays)
    return dict(equal=equal, config=config, data=data, shapes=different, arrays=arrays, same=len(alike) - len(arrays))


def _lines(a: Any, b: Any) -> list[str]:
    return [f"{field}: {was} -> {now}" for field, (was, now) in changed(a, b).items()]


def _read(checkpoints: Checkpoints, step: int, name: str, of: Any) -> np.ndarray:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.ShapeDtypeStruct(tuple(of.shape), of.dtype, sharding=here)
    return np.asarray(checkpoints.arrays(step, {name: wanted})[name])


def _apart(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    wide = [side.astype(np.float64) for side in (x, y)]
    norm = float(np.linalg.norm(wide[0]))
    apart = float(np.linalg.norm(wide[1] - wide[0]))
    unequal = x.reshape(-1).view(np.uint8) != y.reshape(-1).view(np.uint8)
    entries = int(unequal.reshape(x.size, -1).any(axis=1).sum())
    return dict(entries=entries, size=x.size, relative=apart / norm if norm else apart)
