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
from llama4_jax.kernels.grouped_matmul.api import grouped_matmul, rows_multiple
from llama4_jax.layers import SwiGLU

EXACT = jax.lax.Precision.HIGHEST  # without it, TPUs and GPUs multiply fp32 as bf16 or TF32


class RouterStats(NamedTuple):
    """Sums over this device's valid tokens, a row per MoE layer once stacked: what the auxiliary losses need."""

    load: Float[Array, "... E"]  # tokens sent to each expert
    probability: Float[Array, "... E"]  # softmax of the router's logits, summed
    z: Float[Array, "..."]  # logsumexp(logits)^2, summed
    tokens: Float[Array, "..."]  # valid tokens


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


class Experts(nnx.Module):
    """E SwiGLU experts, their matrices stacked."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        E, D, F, std = cfg.num_experts, cfg.embed_dim, cfg.expert_dim, cfg.init_std
        self.wi_gate_EDF = param(rngs, (E, D, F), ("experts", "embed", "ffn"), std)
        self.wi_up_EDF = param(rngs, (E, D, F), ("experts", "embed", "ffn"), std)
        self.wo_EFD = param(rngs, (E, F, D), ("experts", "ffn", "embed"), std / np.sqrt(2 * cfg.num_layers))

    def __call__(self, x_RD: Float[Array, "R D"], group_sizes_E: Int[Array, "E"], backend: str) -> Float[Array, "R D"]:
        """Rows sorted by expert, `group_sizes_E` of each."""
        gate_RF = grouped_matmul(x_RD, self.wi_gate_EDF[...], group_sizes_E, backend)
        up_RF = grouped_matmul(x_RD, self.wi_up_EDF[...], group_sizes_E, backend)
        return grouped_matmul(jax.nn.silu(gate_RF) * up_RF, self.wo_EFD[...], group_sizes_E, backend)


class MoE(nnx.Module):
    """y = Shared(x) + sum over the top-k experts e of Expert_e(sigmoid(z_e) x), with z = x Wr in fp32.

    Experts are chosen by the raw logit; nothing is renormalised, nothing dropped. Scaling the input is not scaling
    the output: SwiGLU is not linear. Returns this device's share over the tensor axis.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.router_DE = param(rngs, (cfg.embed_dim, cfg.num_experts), ("embed", None), cfg.init_std, fp32=True)
        self.shared = SwiGLU(cfg, cfg.expert_dim, rngs)
        self.experts = Experts(cfg, rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Float[Array, "B T"], execution: Execution
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        with jax.named_scope("router"):
            logits_RE = jnp.matmul(x_RD.astype(jnp.float32), self.router_DE[...], precision=EXACT)
            z_RA, chosen_RA = jax.lax.top_k(logits_RE, self.cfg.experts_per_token)
            stats = _statistics(logits_RE, chosen_RA, valid_BT.reshape(-1))
        with jax.named_scope("experts"):
            y_RD = self._dispatch(x_RD, jax.nn.sigmoid(z_RA), chosen_RA, execution)
        with jax.named_scope("shared_expert"):
            y_RD += self.shared(x_RD)
        return y_RD.reshape(x_BTD.shape), stats

    def _dispatch(self, x_RD: jax.Array, gate_RA: jax.Array, chosen_RA: jax.Array, execution: Execution) -> jax.Array:
        """Sort the (token, choice) pairs by expert, each group padded to the kernel's row multiple, and back."""
        R, A = chosen_RA.shape
        E = self.cfg.num_experts
        backend = execution.grouped_matmul
        multiple = rows_multiple(backend)
        expert_Q = chosen_RA.reshape(-1)  # Q = R A pairs
        order_Q = jnp.argsort(expert_Q, stable=True)
        count_E = jnp.bincount(expert_Q, length=E)
        padded_E = -(-count_E // multiple) * multiple
        # A pair's slot: the start of its expert's padded group plus its rank within the group.
        shift_E = (jnp.cumsum(padded_E) - padded_E) - (jnp.cumsum(count_E) - count_E)
        slot_Q = jnp.zeros(R * A, jnp.int32).at[order_Q].set(jnp.arange(R * A, dtype=jnp.int32))
        slot_Q = slot_Q + shift_E[expert_Q]
        slots = -(-R * A // multiple) * multiple + (E * multiple if multiple > 1 else 0)
        pair_S = jnp.full(slots, R * A, jnp.int32).at[slot_Q].set(jnp.arange(R * A, dtype=jnp.int32))
        x_QD = (x_RD[:, None, :] * gate_RA[:, :, None].astype(x_RD.dtype)).reshape(R * A, -1)
        x_SD = x_QD.at[pair_S].get(mode="fill", fill_value=0)  # the empty slots hold zeros, and give zeros
        y_SD = self.experts(x_SD, padded_E, backend)
        return y_SD[slot_Q].reshape(R, A, -1).sum(axis=1)


def _statistics(logits_RE: jax.Array, chosen_RA: jax.Array, valid_R: jax.Array) -> RouterStats:
    one_hot_RE = jax.nn.one_hot(chosen_RA, logits_RE.shape[-1], dtype=jnp.float32).sum(axis=1)
    return RouterStats(
        load=(valid_R[:, None] * one_hot_RE).sum(axis=0),
        probability=(valid_R[:, None] * jax.nn.softmax(logits_RE, axis=-1)).sum(axis=0),
        z=(valid_R * jnp.square(jax.nn.logsumexp(logits_RE, axis=-1))).sum(),
        tokens=valid_R.sum(),
    )
