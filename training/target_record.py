"""One record of stored soft targets: those of a piece of a document, a fixed number of bytes a token.

A record is a header and, for each token, these fields (little-endian, packed; V at most 2^18 - 1):

| field | bytes | of | what |
|---|---|---|---|
| ids | 18 K / 8, rounded up | all | K ids of 18 bits, the lowest bits first; 2^18 - 1 stands for an unused entry |
| rest | 4 | topk, stratified | fp32, the mass p_rest of all ids but the largest |
| high, span | 2 + 1 | of a top above 1 | the range of the codes: fp16 log-probability, and its length in 1/16 nats |
| codes | top - 1 | of a top above 1 | log-probabilities of the second largest and on |
| lse, entropy, label | 2 + 2 + 2 | all | fp16, in nats: relative error 2^-11 |

**Codes.** c = 1..255 stands for the mass exp(high - span/16 (255 - c)/254), c = 0 for none. `high` is log p_2, rounded
up; `span` reaches down to the smallest of the top, at most 15.9 nats (what lies deeper, less than 1e-6 of p_2, becomes
1.3e-7 p_2 or nothing). Neighbouring codes are D = span/16/254 apart, 0.063 nats at most and mostly below 0.03. A mass
between those of two codes takes the upper one with the probability (x - a)/(b - a), so that it is itself in
expectation; its error is at most a share exp(D) - 1 of it (6.5 %), and D/sqrt(6) or less in the mean square (2.6 %).
The largest p is not stored: it is 1 - rest - the others, so that masses sum to 1, and it has an expectation without
bias and the others' errors. The chance is drawn from a generator seeded by the record's key: writing a piece again
gives the same bytes. Draws need no mass: 1/draws of a sample, rest/draws of a stratum.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama4_jax.kernels.vocab_loss.sparse import KINDS, Kind, SparseTargets, check, entries

MAGIC, VERSION = b"L4ST", 1
BITS = 18
UNUSED = 2**BITS - 1
KEY_BYTES = 16
_HEADER = struct.Struct("<4sHBxHHI16s")  # magic, version, kind, top, draws, tokens, key
_CHECKSUM = struct.Struct("<I")  # crc32 of all else
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_LOWEST = 1e-37  # a mass that has a logarithm


@dataclass(frozen=True)
class Form:
    """What of a distribution is kept: see `llama4_jax.kernels.vocab_loss.sparse.sparsify`."""

    kind: Kind = "stratified"
    top: int = 32
    draws: int = 16

    def __post_init__(self):
        check(self.kind, self.top, self.draws)

    @property
    def entries(self) -> int:
        """K."""
        return entries(self.kind, self.top, self.draws)

    @property
    def token(self) -> np.dtype:
        """The fields of a token."""
        fields: list[Any] = [("ids", "u1", (-(-BITS * self.entries // 8),))]
        if self.kind != "sample":
            fields.append(("rest", "<f4"))
        if self.top > 1:
            fields += [("high", "<f2"), ("span", "u1"), ("codes", "u1", (self.top - 1,))]
        return np.dtype([*fields, ("lse", "<f2"), ("entropy", "<f2"), ("label_logp", "<f2")])

    def __str__(self) -> str:
        parts = {"topk": f"top {self.top}", "sample": f"{self.draws} draws"}
        return f"{self.kind}, {parts.get(self.kind, f'top {self.top} and {self.draws} draws')}"


def encode(form: Form, key: bytes, targets: SparseTargets) -> bytes:
    """The record of a piece: its targets are numpy arrays [n, K] and [n], as `sparsify` gives them for `form`."""
    n = len(targets.lse)
    out = np.zeros(n, form.token)
    ids = np.asarray(targets.ids)
    out["ids"] = pack(np.where(ids < 0, UNUSED, ids))
    mass = np.asarray(targets.mass, np.float64)
    if form.kind == "topk":
        out["rest"] = targets.tail
    elif form.kind == "stratified":
        out["rest"] = mass[:, form.top :].sum(axis=1)  # unused entries have none
    if form.top > 1:
        out["high"], out["span"], out["codes"] = to_codes(mass[:, 1 : form.top], key)
    for name in ("lse", "entropy", "label_logp"):
        out[name] = np.clip(getattr(targets, name), -65504, 65504)
    header = _HEADER.pack(MAGIC, VERSION, KINDS.index(form.kind), form.top, form.draws, n, key)
    payload = out.tobytes()
    return header + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


def payload(form: Form, key: bytes, tokens: int, record: bytes) -> memoryview:
    """What `decode` takes, once the record is known to be whole and of this piece; else ValueError says what it is."""
    if len(record) < HEADER_BYTES or record[:4] != MAGIC:
        raise ValueError("it is no record of targets")
    header, body = record[: _HEADER.size], memoryview(record)[HEADER_BYTES:]
    if _CHECKSUM.unpack_from(record, _HEADER.size)[0] != zlib.crc32(body, zlib.crc32(header)):
        raise ValueError("its checksum is not that of its bytes: it is corrupted")
    _, version, kind, top, draws, n, of = _HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"it is of version {version} of the format, not {VERSION}")
    if of != key or n != tokens:
        raise ValueError(f"it holds {n} tokens of hash {of.hex()}, not {tokens} of {key.hex()}")
    if (KINDS[kind], top, draws) != (form.kind, form.top, form.draws) or len(body) != n * form.token.itemsize:
        raise ValueError(f"it is not of the form {form}")
    return body


def decode(form: Form, joined: bytes) -> SparseTargets:
    """The targets [N, K], [N] of payloads one behind the other, numpy arrays."""
    fields = np.frombuffer(joined, form.token)
    n, top = len(fields), max(form.top, 1)
    ids = unpack(fields["ids"], form.entries)
    mass, tail = np.zeros((n, form.entries), np.float32), np.zeros(n, np.float32)
    if form.kind == "sample":
        mass[:, 1:] = 1 / form.draws
    else:
        rest = fields["rest"]
        if top > 1:
            mass[:, 1:top] = from_codes(fields["high"], fields["span"], fields["codes"])
        mass[:, 0] = np.maximum(1 - rest - mass[:, 1:top].sum(axis=1), 0)
        if form.kind == "topk":
            tail = rest.astype(np.float32)
        else:
            mass[:, top:] = (rest / form.draws)[:, None]
    if (unused := ids == UNUSED).any():
        ids[unused], mass[unused] = -1, 0
    scalars = (fields[name].astype(np.float32) for name in ("lse", "entropy", "label_logp"))
    return SparseTargets._make((ids, mass, tail, *scalars, np.ones(n, bool)))


def to_codes(mass: np.ndarray, key: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(high [n], span [n], codes [n, j]) of falling masses [n, j]."""
    log = np.log(np.maximum(mass, _LOWEST))
    high = log[:, 0].astype(np.float16)
    high = np.where(high < log[:, 0], np.nextafter(high, np.float16(1)), high)
    span = np.clip(np.ceil((high - log[:, -1]) * 16), 1, 255).astype(np.uint8)
    step = span[:, None] / (16 * 254)
    code = np.clip(np.floor(255 - (high[:, None] - log) / step), 0, 254)
    below = np.exp(high[:, None] - step * (255 - code)) * (code > 0)
    above = np.exp(high[:, None] - step * (254 - code))
    chance = np.random.default_rng(np.frombuffer(key, np.uint32)).random(mass.shape, np.float32)
    return high, span, (code + (chance * (above - below) < mass - below)).astype(np.uint8)


def from_codes(high: np.ndarray, span: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The masses [n, j], fp32."""
    depth = (255 - codes.astype(np.float32)) * (span.astype(np.float32) / (16 * 254))[:, None]
    return np.exp(high.astype(np.float32)[:, None] - depth) * (codes > 0)


def pack(ids: np.ndarray) -> np.ndarray:
    """Ids [n, K] below 2^18 as bytes [n, 18 K / 8, rounded up]: four are nine bytes."""
    n, count = ids.shape
    four = np.zeros((n, -(-count // 4), 4), np.uint64)
    four.reshape(n, -1)[:, :count] = ids
    nine = np.empty((*four.shape[:2], 9), np.uint8)
    low = four[..., 0] | four[..., 1] << 18 | four[..., 2] << 36 | four[..., 3] << 54
    nine[..., :8] = low.astype("<u8")[..., None].view(np.uint8)
    nine[..., 8] = four[..., 3] >> 10
    return nine.reshape(n, -1)[:, : -(-BITS * count // 8)]


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """The int32 ids [n, K] that `pack` took."""
    n, size = packed.shape
    nine = np.zeros((n, -(-count // 4), 9), np.uint8)
    nine.reshape(n, -1)[:, :size] = packed
    low = np.ascontiguousarray(nine[..., :8]).view("<u8")[..., 0]
    out = np.empty((*nine.shape[:2], 4), np.int32)
    for i in range(3):
        out[..., i] = low >> (BITS * i) & UNUSED
    out[..., 3] = low >> 54 | nine[..., 8].astype(np.uint64) << 10
    return np.ascontiguousarray(out.reshape(n, -1)[:, :count])
