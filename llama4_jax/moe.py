"""Mixture of experts: a sigmoid top-k router whose gate scales the expert's *input*, and a shared expert."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.axes import TOKEN_AXES, Execution, param, psum
from llama4_jax.config import ModelConfig
from llama4_jax.dispatch import DISPATCHES, Matmul
from llama4_jax.layers import SwiGLU, swiglu

EXACT = jax.lax.Precision.HIGHEST  # without it, TPUs and GPUs multiply fp32 as bf16 or TF32


class RouterStats(NamedTuple):
    """Sums over this device's valid tokens, a row per MoE layer once stacked: what the auxiliary losses need."""

    load: Float[Array, "... E"]  # tokens sent to each expert
    probability: Float[Array, "... E"]  # softmax of the router's logits, summed
    z: Float[Array, "..."]  # logsumexp(logits)^2, summed
    tokens: Float[Array, "..."]  # valid tokens
    dropped: Float[Array, "..."]  # pairs of a token and an expert that a dispatch had no room for


def router_losses(stats: RouterStats, experts_per_token: int) -> tuple[Float[Array, ""], Float[Array, ""], RouterStats]:
    """Balance loss and z-loss, means over MoE layers, and the statistics of the global batch.

    With f_e the share of routed tokens that expert e got and P_e the mean over tokens of softmax(logits)_e,
      balance = E sum_e f_e P_e      (Switch Transformer, arXiv 2101.03961 eq. 4; 1 when balanced; f is a constant)
      z       = mean over tokens of logsumexp(logits)^2      (ST-MoE, arXiv 2202.08906 eq. 5).
    Both run over the tokens of the whole (micro)batch, on all devices, padding excluded.
    """
    total = RouterStats(*psum(tuple(stats), TOKEN_AXES))
    tokens = jnp.maximum(total.tokens, 1.0)
    f_E = jax.lax.stop_gradient(total.load / (tokens * experts_per_token)[..., None])
    p_E = total.probability / tokens[..., None]
    balance = f_E.shape[-1] * jnp.sum(f_E * p_E, axis=-1)
    return jnp.mean(balance), jnp.mean(total.z / tokens), jax.lax.stop_gradient(total)


def choose(
    logits_RE: Float[Array, "R E"], bias_E: Float[Array, "E"] | None, top: int
) -> tuple[Float[Array, "R A"], Int[Array, "R A"]]:
    """The `top` experts with the largest z + b, and their z: b chooses and does nothing else, so it has no gradient."""
    if bias_E is None:
        z_RA, chosen_RA = jax.lax.top_k(logits_RE, top)
    else:
        _, chosen_RA = jax.lax.top_k(jax.lax.stop_gradient(logits_RE + bias_E[None, :]), top)
        z_RA = jnp.take_along_axis(logits_RE, chosen_RA, axis=1)
    return z_RA, chosen_RA


class Experts(nnx.Module):
    """E SwiGLU experts, their matrices stacked."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        E, D, F, std = cfg.num_experts, cfg.embed_dim, cfg.expert_dim, cfg.init_std
        self.wi_gate_EDF = param(rngs, (E, D, F), ("experts", "embed", "ffn"), std)
        self.wi_up_EDF = param(rngs, (E, D, F), ("experts", "embed", "ffn"), std)
        self.wo_EFD = param(rngs, (E, F, D), ("experts", "ffn", "embed"), std / np.sqrt(2 * cfg.num_layers))

    def __call__(self, x: jax.Array, matmul: Matmul) -> jax.Array:
        """Rows, arranged as a dispatch has them, through their own expert."""
        return swiglu(matmul, x, self.wi_gate_EDF[...], self.wi_up_EDF[...], self.wo_EFD[...])


class MoE(nnx.Module):
    """y = Shared(x) + sum over the top-k experts e of Expert_e(sigmoid(z_e) x), with z = x Wr in fp32.

    Experts are chosen by the raw logit, or with `router_bias` by z + b, where b is set by a training that balances
    loads without a loss (Wang et al., arXiv 2408.15664); gate and statistics are of the raw logit always. Nothing is
    renormalised. Scaling the input is not scaling the output: SwiGLU is not linear. A pair of token and expert that a
    dispatch has no room for (`dispatch.py`) adds nothing. Returns this device's share over the tensor axis.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.router_DE = param(rngs, (cfg.embed_dim, cfg.num_experts), ("embed", None), cfg.init_std, fp32=True)
        if cfg.router_bias:
            self.bias_E = param(rngs, (cfg.num_experts,), (None,), 0.0, fp32=True)
        self.shared = SwiGLU(cfg, cfg.expert_dim, rngs)
        self.experts = Experts(cfg, rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Float[Array, "B T"], execution: Execution
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        E, A = self.cfg.num_experts, self.cfg.experts_per_token
        with jax.named_scope("router"):
            logits_RE = jnp.matmul(x_RD.astype(jnp.float32), self.router_DE[...], precision=EXACT)
            z_RA, chosen_RA = choose(logits_RE, self.bias_E[...] if self.cfg.router_bias else None, A)
        with jax.named_scope("experts"):
            gated_RAD = x_RD[:, None, :] * jax.nn.sigmoid(z_RA)[:, :, None].astype(x_RD.dtype)
            expert_RA = jnp.where(valid_BT.reshape(-1, 1) > 0, chosen_RA, E)  # padding visits no expert
            dispatch = DISPATCHES[execution.dispatch]
            y_QD, served_Q = dispatch(
                self.experts, gated_RAD.reshape(-1, x_RD.shape[1]), expert_RA.reshape(-1), E, execution
            )
            y_RD = y_QD.reshape(gated_RAD.shape).sum(axis=1)
        with jax.named_scope("shared_expert"):
            y_RD += self.shared(x_RD, execution)
        return y_RD.reshape(x_BTD.shape), _statistics(logits_RE, chosen_RA, valid_BT.reshape(-1), served_Q)


def _statistics(logits_RE: jax.Array, chosen_RA: jax.Array, valid_R: jax.Array, served_Q: jax.Array) -> RouterStats:
    one_hot_RE = jax.nn.one_hot(chosen_RA, logits_RE.shape[-1], dtype=jnp.float32).sum(axis=1)
    return RouterStats(
        load=(valid_R[:, None] * one_hot_RE).sum(axis=0),
        probability=(valid_R[:, None] * jax.nn.softmax(logits_RE, axis=-1)).sum(axis=0),
        z=(valid_R * jnp.square(jax.nn.logsumexp(logits_RE, axis=-1))).sum(),
        tokens=valid_R.sum(),
        dropped=valid_R.sum() * chosen_RA.shape[1] - served_Q.sum(),
    )
