"""Whether a Hugging Face folder means the same to this project as to another implementation of Llama 4."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import nnx

from llama4_jax import hf
from llama4_jax.text import abstract
from training import oracle
from training.hf_import import load_hf
from training.model_folder import CONFIG, read_config
from training.safetensors_header import DTYPES, read_json, stored_tensors

Against = Literal["transformers", "numpy"]
MARGIN = 1e-5
"""Two router logits closer than this, relative to the largest, may change places by rounding alone."""


@dataclass(frozen=True)
class Verification:
    """How far our logits are from another implementation's, on the same weights and tokens in fp32."""

    against: str
    """The other implementation: transformers, or numpy (`training/oracle.py`)."""

    max_relative_error: float
    """max |ours - theirs| / max |theirs| over all tokens and the vocabulary."""
    router_margin: float
    """Smallest gap between the last expert chosen and the first that was not, relative to the largest logit."""
    tolerance: float
    """What the error may be."""
    dtype: str
    """As which the weights are stored."""
    tokens: int
    """Length of the sequences compared."""
    chunks: int
    """Chunks of local attention they touch."""
    near_tie: bool = False
    """Wherever a row begins to differ, a token at or before that place lies between two experts (below `MARGIN`)."""

    @property
    def ok(self) -> bool:
        return self.max_relative_error <= self.tolerance

    @property
    def undecided(self) -> bool:
        """The logits differ, but tokens were so near to another expert that rounding can have moved them."""
        return not self.ok and self.near_tie

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "undecided, compared" if self.undecided else "NOT EQUAL"
        hint = "; a token lies between two experts: repeat with another seed" if self.undecided else ""
        return (
            f"{verdict} to {self.against}: max |a - b| / max |b| = {self.max_relative_error:.2e} "
            f"(tolerance {self.tolerance:.0e}), router margin {self.router_margin:.2e}, {self.dtype} weights, "
            f"{self.tokens} tokens over {self.chunks} chunks{hint}"
        )


def verify(
    folder: epath.PathLike,
    tolerance: float = 1e-4,
    tokens: int | None = None,
    *,
    against: Against = "transformers",
    batch: int = 2,
    seed: int = 0,
) -> Verification:
    """Load a folder with this model and with another implementation (fp32, CPU) and compare the logits.

    `against`: transformers (eager attention; ValueError where it is not installed), or the NumPy oracle, which needs
    nothing. `tokens`: length of the `batch` random sequences; by default three and a half chunks, at most 4096 tokens
    (eager attention holds T^2 scores a head). Both models in turn must fit into memory in fp32.
    """
    folder = epath.Path(folder)
    cfg = read_config(folder)
    stored = stored_tensors(folder)
    tokens = min(3 * cfg.chunk + cfg.chunk // 2, 4096) if tokens is None else tokens
    ids_BT = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, tokens), dtype=np.int32)
    theirs = _transformers_logits if against == "transformers" else _numpy_logits
    theirs_BTV, routers = theirs(folder, ids_BT)
    graphdef = nnx.split(abstract(cfg))[0]
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda params, ids_BT: nnx.merge(graphdef, params).logits(ids_BT))
        ours_BTV = np.asarray(logits(load_hf(folder), ids_BT))
    error_BT = np.max(np.abs(ours_BTV - theirs_BTV), axis=-1) / np.max(np.abs(theirs_BTV))
    margin_BT = np.min([router_margins(z_RE, cfg.experts_per_token) for z_RE in routers], axis=0).reshape(batch, tokens)
    return Verification(
        against=against,
        max_relative_error=float(np.max(error_BT)),
        router_margin=float(margin_BT.min()),
        near_tie=starts_at_ties(error_BT, margin_BT, tolerance),
        tolerance=tolerance,
        dtype=", ".join(sorted({DTYPES[s.dtype].name for s in stored.values() if s.dtype in DTYPES})),
        tokens=tokens,
        chunks=-(-tokens // cfg.chunk),
    )


def _numpy_logits(folder: epath.Path, ids_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [B, T, V] of the oracle, and the router's of each MoE layer."""
    stored = stored_tensors(folder)
    prefix = hf.TEXT_PREFIX if hf.is_whole_model(read_json(folder / CONFIG)) else ""

    def weight(name: str) -> np.ndarray:
        return stored[name].read(0, stored[name].shape[0]).astype(np.float32)

    return oracle.logits(hf.config_to_hf(read_config(folder)), weight, ids_BT, prefix)  # settings in one spelling


def _transformers_logits(folder: epath.Path, ids_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [B, T, V] of transformers, and the router's of each MoE layer."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import Llama4ForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"this needs transformers and torch: install the extra [verify], or compare --against numpy ({error})"
        ) from None
    load: Any = Llama4ForCausalLM.from_pretrained  # a pair with output_loading_info
    model, info = load(
        os.fspath(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True,
        output_loading_info=True,
    )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"transformers finds no weights for {missing[0]} in {folder}")
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(ids_BT).long(), use_cache=False, output_router_logits=True)
    return out.logits.numpy(), [z_RE.numpy() for z_RE in out.router_logits]


def starts_at_ties(error_BT: np.ndarray, margin_BT: np.ndarray, tolerance: float) -> bool:
    """Whether every row that differs begins to do so at or behind a near tie: an expert that changes moves only later
    positions, so a difference before the first tie has another cause."""
    for error_T, margin_T in zip(error_BT, margin_BT, strict=True):
        wrong = np.flatnonzero(~(error_T <= tolerance))
        if wrong.size and margin_T[: wrong[0] + 1].min() >= MARGIN:
            return False
    return True


def router_margins(logits_RE: np.ndarray, k: int) -> np.ndarray:
    """Of each token, (k-th largest - next) / max |logits| of all; infinite if every expert is chosen."""
    if k == logits_RE.shape[1]:
        return np.full(len(logits_RE), np.inf)
    sorted_RE = np.sort(logits_RE, axis=1)
    return (sorted_RE[:, -k] - sorted_RE[:, -k - 1]) / np.max(np.abs(logits_RE))


def router_margin(logits_RE: np.ndarray, k: int) -> float:
    """The smallest of `router_margins`."""
    return float(np.min(router_margins(logits_RE, k)))
