"""Cross-entropy and forward KL from whole logits: the truth that the chunked form is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def vocab_loss(
    h_RD: Float[Array, "R D"],
    w_DV: Float[Array, "D V"],
    labels_R: Int[Array, "R"],
    hard_R: Float[Array, "R"],
    soft_R: Float[Array, "R"] | None = None,
    teacher: tuple[Float[Array, "R U"], Float[Array, "U V"]] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, "R"], Float[Array, "R"]]:
    """(sum_i hard_i CE_i + soft_i t^2 KL_i, CE_R, KL_R); see `api.vocab_loss`."""
    z_RV = jnp.einsum("RD,DV->RV", h_RD, w_DV, preferred_element_type=jnp.float32)
    ce_R = jax.nn.logsumexp(z_RV, axis=-1) - jnp.take_along_axis(z_RV, labels_R[:, None], axis=-1)[:, 0]
    loss, kl_R = jnp.sum(hard_R * ce_R), jnp.zeros_like(ce_R)
    if teacher is not None and soft_R is not None:
        t_RV = jnp.einsum("RD,DV->RV", *teacher, preferred_element_type=jnp.float32)
        log_p_RV = jax.nn.log_softmax(jax.lax.stop_gradient(t_RV) / temperature, axis=-1)
        log_q_RV = jax.nn.log_softmax(z_RV / temperature, axis=-1)
        kl_R = jnp.sum(jnp.exp(log_p_RV) * (log_p_RV - log_q_RV), axis=-1)
        loss += temperature**2 * jnp.sum(soft_R * kl_R)
    return loss, ce_R, kl_R
