"""Weights in four or eight bits, in the form of `compressed-tensors`, which vLLM and transformers load.

Quantised are the matrices of attention, of dense layers and of experts, shared and routed (one of theirs for each
expert, [out, in]); router, norms, embedding and head stay as they are. Symmetric, weights alone: w ~ q s with one scale
s (bf16) for a row of `group` weights along the input, or for a whole row.

* int4: q in -8..7, eight of them in an int32, the first in the lowest bits, each plus 8: NAME_packed; NAME_scale;
  NAME_shape.
* int8: q in -128..127, likewise four in an int32, each plus 128.
* fp8: q in float8_e4m3fn, as NAME itself; NAME_scale.

The scale of a row is the one of `STEPS` candidates, shares of what its largest weight would need, whose squared error
is least, then set to the least squares fit of the codes it gives where that is better still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from training.safetensors_header import DTYPES, Stored

STEPS = np.linspace(0.5, 1.0, 11)
KINDS = ("int", "float")


@dataclass(frozen=True)
class Scheme:
    """A way to quantise."""

    name: str
    kind: Literal["int", "float"]
    bits: int
    group: int | None
    """Weights that share a scale; None: a row."""

    @property
    def largest(self) -> float:
        """What a scale of 1 reaches."""
        return 448.0 if self.kind == "float" else 2.0 ** (self.bits - 1) - 0.5

    @property
    def packed(self) -> bool:
        return self.kind == "int"

    def outputs(self, name: str, shape: Sequence[int]) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what stands for a matrix [out, in]; ValueError where its rows do not divide."""
        out, inner = shape
        group = self.group or inner
        unit = 32 // self.bits if self.packed else 1
        if inner % group or inner % unit:
            raise ValueError(f"{self.name} needs rows of a multiple of {max(group, unit)} weights, {name} has {inner}")
        scale = (f"{name}_scale", "BF16", (out, inner // group))
        if self.packed:
            return [(f"{name}_packed", "I32", (out, inner // unit)), scale, (f"{name}_shape", "I64", (2,))]
        return [(name, "F8_E4M3", (out, inner)), scale]

    def quantise(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some rows of a matrix, fp32 -> the next bytes of the first two `outputs`, codes and scales."""
        group = self.group or rows.shape[1]
        codes, scale = (np.asarray(x) for x in _quantise(rows.reshape(-1, group), self))
        scale = scale.reshape(rows.shape[0], -1)
        if not self.packed:
            return [codes.reshape(rows.shape), scale]
        return [pack(codes.reshape(rows.shape), self.bits), scale]

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits, "type": self.kind, "symmetric": True, "group_size": self.group,
            "strategy": "group" if self.group else "channel", "block_structure": None, "dynamic": False,
            "actorder": None, "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        form = "pack-quantized" if self.packed else "float-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
                 "format": form}  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "global_compression_ratio": None, "kv_cache_scheme": None, "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*feed_forward\\.router$", "re:.*vision_model.*", "re:.*multi_modal_projector.*"],
        }  # fmt: skip


SCHEMES = {
    s.name: s
    for s in (Scheme("int4-g32", "int", 4, 32), Scheme("int4-g128", "int", 4, 128), Scheme("int8", "int", 8, None),
              Scheme("fp8", "float", 8, None))
}  # fmt: skip


def applies(name: str) -> bool:
    """Whether a tensor of theirs is one of those matrices."""
    return name.endswith("_proj.weight") and not name.startswith(("vision_model.", "multi_modal_projector."))


@partial(jax.jit, static_argnames="scheme")
def _quantise(w_RG: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Codes [rows, group] and scales [rows] of the least squared error among the candidates."""

    def codes(scale_R):
        q_RG = w_RG / scale_R[:, None]
        if scheme.kind == "float":
            return jnp.clip(q_RG, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        most = 2.0 ** (scheme.bits - 1)
        return jnp.clip(jnp.round(q_RG), -most, most - 1)

    def usable(scale_R):
        scale_R = scale_R.astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.where(scale_R > 1e-30, scale_R, 1.0)

    def consider(best, scale_R):
        scale_R = usable(scale_R)
        error_R = jnp.sum(jnp.square(w_RG - codes(scale_R) * scale_R[:, None]), axis=1)
        better_R = error_R < best[0]
        return jnp.where(better_R, error_R, best[0]), jnp.where(better_R, scale_R, best[1])

    full_R = jnp.max(jnp.abs(w_RG), axis=1) / scheme.largest
    best = (jnp.full(full_R.shape, jnp.inf), usable(full_R))
    best = jax.lax.scan(lambda b, step: (consider(b, full_R * step), None), best, jnp.asarray(STEPS, jnp.float32))[0]
    q_RG = codes(best[1])
    fitted_R = jnp.sum(w_RG * q_RG, axis=1) / jnp.maximum(jnp.sum(jnp.square(q_RG), axis=1), 1e-30)
    scale_R = consider(best, fitted_R)[1]
    stored = jnp.int8 if scheme.kind == "int" else jnp.float8_e4m3fn
    return codes(scale_R).astype(stored), scale_R.astype(jnp.bfloat16)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes [..., n] -> int32 [..., n bits / 32], the first code in the lowest bits."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return np.ascontiguousarray(unsigned).view("<i4")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes again."""
    unsigned = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        unsigned = np.stack([unsigned & 15, unsigned >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return (unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dequantised:
    """A quantised matrix, read like a `Stored` one: q s, which fp32 holds exactly."""

    codes: Stored
    scale: Stored
    bits: int
    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def file(self):
        return self.codes.file

    def whole(self) -> np.ndarray:
        return self.box([(0, n) for n in self.shape])

    def read(self, first: int, last: int) -> np.ndarray:
        return self.box([(first, last), (0, self.shape[1])])

    def box(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        (a, b), (c, d) = ranges
        group, unit = self.shape[1] // self.scale.shape[1], self.shape[1] // self.codes.shape[1]
        first, last = c // unit, -(-d // unit)
        codes = self.codes.box([(a, b), (first, last)])
        if self.codes.dtype == "I32":
            codes = unpack(codes, self.bits)[:, c - first * unit : d - first * unit]
        scale = self.scale.box([(a, b), (c // group, -(-d // group))])
        wide = np.repeat(scale, group, axis=1)[:, c % group :][:, : d - c].astype(np.float32)
        return codes.astype(np.float32) * wide


def dequantised(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored | Dequantised]:
    """The folder's tensors, quantised ones as if they were not; ValueError names what is of another form."""
    form = config.get("quantization_config")
    if form is None:
        return dict(stored)
    weights = [group.get("weights") or {} for group in (form.get("config_groups") or {}).values()]
    known = all(
        w.get("symmetric") and w.get("num_bits") in (4, 8) and w.get("type") in ("int", "float") for w in weights
    )
    if not weights or not known or any(w != weights[0] for w in weights):
        raise ValueError("config.json: quantization_config must have groups of symmetric weights in 4 or 8 bits alike")
    bits = weights[0]["num_bits"]
    out: dict[str, Stored | Dequantised] = {}
    for name, entry in stored.items():
        if name.endswith((".weight_scale", ".weight_shape")):
            continue
        plain = name.removesuffix("_packed")
        if plain == name and entry.dtype in DTYPES:
            out[name] = entry
            continue
        scale = stored.get(f"{plain}_scale")
        if scale is None or len(entry.shape) != 2 or len(scale.shape) != 2 or scale.dtype not in DTYPES:
            raise ValueError(f"tensor {name} in {entry.file} is quantised, but has no {plain}_scale [out, groups]")
        shape = (entry.shape[0], entry.shape[1] * (32 // bits if plain != name else 1))
        dtypes = ("I32",) if plain != name else ("I8", "F8_E4M3")
        if entry.dtype not in dtypes or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
            raise ValueError(f"tensor {name} in {entry.file} is {entry.dtype}{list(entry.shape)}, which does not fit "
                             f"{plain}_scale {list(scale.shape)}")  # fmt: skip
        out[plain] = Dequantised(entry, scale, bits, shape)
    return out
