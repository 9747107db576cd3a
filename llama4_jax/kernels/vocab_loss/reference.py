"""The loss from whole logits, its gradient by autodiff: the truth that the chunked form is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.vocab_loss.comparison import KL, Comparison, Dense, Stats
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets


def vocab_loss(
    h_RD: Float[Array, "R D"],
    w_DV: Float[Array, "D V"],
    labels_R: Int[Array, "R"],
    hard_R: Float[Array, "R"],
    soft_R: Float[Array, "R"] | None = None,
    teacher: Dense | SparseTargets | None = None,
    comparison: Comparison = KL,
    toward: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """(sum_i hard_i CE_i + soft_i g_i t^2 D_i, statistics); see `api.vocab_loss`."""
    constant = jax.lax.stop_gradient
    z_RV = jnp.einsum("RD,DV->RV", h_RD, w_DV, preferred_element_type=jnp.float32)
    rows, V = jnp.arange(z_RV.shape[0]), z_RV.shape[1]
    log_q_RV = jax.nn.log_softmax(z_RV)
    ce_R, q_RV = -log_q_RV[rows, labels_R], jnp.exp(log_q_RV)
    loss = jnp.sum(hard_R * ce_R)
    stats = Stats(ce_R)
    hard_RV = q_RV - jax.nn.one_hot(labels_R, V)
    entropy_R = -jnp.sum(q_RV * log_q_RV, axis=-1)
    if comparison.measure:
        best_R = q_RV.max(axis=-1)
        stats = stats._replace(entropy=entropy_R, confidence=best_R, correct=q_RV[rows, labels_R] >= best_R)
    if teacher is None or soft_R is None:
        return loss, constant(jax.tree.map(jnp.float32, stats))
    teacher, entropy_p_R = constant(teacher), 0.0
    log_p_RV = p_RV = jnp.zeros_like(q_RV)
    if isinstance(teacher, Dense):
        teacher_RV = jnp.einsum("RD,DV->RV", *teacher, preferred_element_type=jnp.float32)
        log_p_RV = jax.nn.log_softmax(teacher_RV)
        p_RV = jnp.exp(log_p_RV)
        entropy_p_R = -jnp.sum(p_RV * log_p_RV, axis=-1)

        def each(z_RV):
            t = comparison.temperature
            mixed_RV = teacher_RV if toward is None else (1 - toward) * constant(z_RV) + toward * teacher_RV
            return divergence(comparison, jax.nn.log_softmax(mixed_RV / t), jax.nn.log_softmax(z_RV / t))
    else:
        entropy_p_R = teacher.entropy

        def each(z_RV):
            return sparse_kl(teacher, jax.nn.log_softmax(z_RV))

    d_R = each(z_RV)
    focus_R = jnp.ones_like(ce_R)
    if comparison.focus == "confidence":
        focus_R = 1 - entropy_p_R / jnp.log(V)
    elif comparison.focus == "student_entropy":
        focus_R = entropy_R / jnp.log(V)
    elif comparison.focus == "disagreement":
        focus_R = 1 - jnp.sum(jnp.sqrt(p_RV * q_RV), axis=-1)
    loss += comparison.temperature**2 * jnp.sum(soft_R * constant(focus_R) * d_R)
    stats = stats._replace(divergence=d_R, focus=focus_R)
    if comparison.measure:
        soft_RV = comparison.temperature**2 * jax.grad(lambda z: each(z).sum())(z_RV)
        stats = stats._replace(
            hard_norm=jnp.linalg.norm(hard_RV, axis=-1), soft_norm=jnp.linalg.norm(soft_RV, axis=-1),
            norm_product=jnp.sum(hard_RV * soft_RV, axis=-1), teacher_entropy=entropy_p_R,
        )  # fmt: skip
        if isinstance(teacher, Dense):
            top = log_p_RV.argmax(axis=-1)
            stats = stats._replace(
                kl=divergence(KL, log_p_RV, log_q_RV),
                reverse_kl=divergence(Comparison("reverse_kl"), log_p_RV, log_q_RV),
                teacher_ce=-log_p_RV[rows, labels_R], present=jnp.ones_like(ce_R),
            )  # fmt: skip
        else:
            top = teacher.ids[:, 0]
            stats = stats._replace(kl=d_R, teacher_ce=-teacher.label_logp, present=teacher.present)
        stats = stats._replace(agreement=q_RV[rows, top] >= q_RV.max(axis=-1))
    return loss, constant(jax.tree.map(jnp.float32, stats))


def divergence(comparison: Comparison, log_p_RV: jax.Array, log_q_RV: jax.Array) -> Float[Array, "R"]:
    """D(p, q) as `Comparison` defines it."""
    b = comparison.skew

    def kl(log_a, log_b):
        return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)

    def mixture(share_of_p):
        return jnp.log(share_of_p * jnp.exp(log_p_RV) + (1 - share_of_p) * jnp.exp(log_q_RV))

    if comparison.kind == "kl":
        return kl(log_p_RV, log_q_RV)
    if comparison.kind == "reverse_kl":
        return kl(log_q_RV, log_p_RV)
    if comparison.kind == "skew_kl":
        return kl(log_p_RV, mixture(b))
    if comparison.kind == "skew_reverse_kl":
        return kl(log_q_RV, mixture(1 - b))
    return b * kl(log_p_RV, mixture(b)) + (1 - b) * kl(log_q_RV, mixture(b))


def sparse_kl(t: SparseTargets, log_q_RV: jax.Array) -> Float[Array, "R"]:
    """-H(p) - sum_k mass_k log q_k, or with the tail as a bucket: KL between distributions over ids and bucket."""
    log_q_RK = jnp.take_along_axis(log_q_RV, jnp.maximum(t.ids, 0), axis=-1)
    cross_R = jnp.sum(t.mass * log_q_RK, axis=-1)
    rest_R = 1 - jnp.sum(jnp.where(t.ids >= 0, jnp.exp(log_q_RK), 0), axis=-1)
    bucket = t.tail > 0
    cross_R += jnp.where(bucket, t.tail * jnp.log(jnp.where(bucket, rest_R, 1)), 0)
    own_R = jnp.sum(jax.scipy.special.xlogy(t.mass, t.mass), axis=-1) + jax.scipy.special.xlogy(t.tail, t.tail)
    return jnp.where(t.present, jnp.where(bucket, own_R, -t.entropy) - cross_R, 0)
