"""Weights from where they lie on devices as a folder in Hugging Face's format."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from data.tokenizer import Tokenizer
from llama4_jax import hf
from llama4_jax.config import ModelConfig
from training import model_folder
from training.export import CODES, SHARD_BYTES, Output, check_bias, check_new, plan_shards, shard_header
from training.safetensors_header import DTYPES


def save_hf(
    params: nnx.State,
    cfg: ModelConfig,
    folder: epath.PathLike,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `params` (the state of a `Transformer(cfg)`) as a folder that transformers loads as Llama4ForCausalLM.

    One tensor of theirs is in host memory at a time. Every process of a multi-host run calls this; the first one
    writes. Raises ValueError as `export_run` does.
    """
    folder = epath.Path(folder)
    check_new(folder)
    model_folder.image_ids(cfg, tokenizer)
    table = list(hf.tensors(cfg))
    weights = _weights(_without_bias(params, cfg), table)
    shards = plan_shards([Output(t.name, CODES[dtype], t.shape) for t in table], shard_bytes)
    by_name = {t.name: t for t in table}
    multihost_utils.sync_global_devices(f"save_hf checked {folder}")  # before the first process creates anything
    writes = jax.process_index() == 0
    # Object stores have no rename; there the missing config and index alone mark what is not complete.
    work = folder if "://" in os.fspath(folder) else folder.with_name(f".{folder.name}.partial")
    if writes:
        if work.exists():
            work.rmtree()
        work.mkdir(parents=True)
    digests: dict[str, str] = {}
    for file, shard in shards.items():
        with (work / file).open("wb") if writes else nullcontext() as f:
            if f is not None:
                f.write(shard_header(shard))
            for t in (by_name[o.name] for o in shard):  # every process takes part in gathering
                parts = (_on_host(weights[path], t.block).astype(DTYPES[CODES[dtype]]) for path in t.paths)
                data = np.ascontiguousarray(t.to_hf(*parts)).reshape(-1).view(np.uint8).data
                if f is not None:
                    f.write(data)
                    digests[t.name] = sha256(data).hexdigest()
    if writes:
        index = {file: [(o.name, o.code, o.shape) for o in some] for file, some in shards.items()}
        manifest = dict(format=1, source=None, dtype=dtype, quantisation=None, sha256=digests)
        model_folder.write(work, cfg, index, dtype, model_folder.About(tokenizer=tokenizer), manifest, None)
        if work != folder:
            work.rename(folder)
    multihost_utils.sync_global_devices(f"save_hf wrote {folder}")


def _without_bias(params: nnx.State, cfg: ModelConfig) -> nnx.State:
    """The weights that Hugging Face's model has; ValueError if the ones it has not change anything."""
    if not cfg.router_bias:
        return params
    flat = list(nnx.to_flat_state(params))
    check_bias({path: _on_host(p.get_value(), None) for path, p in flat if path[-1] == hf.ROUTER_BIAS}, cfg)
    return nnx.from_flat_state([(path, p) for path, p in flat if path[-1] != hf.ROUTER_BIAS])


def _weights(params: nnx.State, table: list[hf.Tensor]) -> dict[hf.Path, jax.Array]:
    """The weights by path, checked against the table: all there, none left over, in the right shapes."""
    weights = {path: p.get_value() for path, p in nnx.to_flat_state(params)}
    expected: dict[hf.Path, tuple[int, ...]] = {}
    for t in table:
        stacked = () if t.block is None else (t.block + 1,)  # the last block of a weight stands
        expected |= dict.fromkeys(t.paths, (*stacked, *t.our_shape))
    for path in [*expected, *(weights.keys() - expected.keys())]:
        got = tuple(weights[path].shape) if path in weights else "nothing"
        want = expected.get(path, "nothing")
        if got != want:
            raise ValueError(
                f"export: weight {'.'.join(map(str, path))} is {got}, the model's configuration has {want}"
            )
    return weights


_take = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False))


def _on_host(weight: jax.Array, block: int | None) -> np.ndarray:
    """One layer's weight, gathered from wherever its shards lie."""
    if block is not None:
        weight = _take(weight, jnp.int32(block))
    if weight.is_fully_addressable:
        return np.asarray(weight)
    return np.asarray(multihost_utils.process_allgather(weight, tiled=True))
