"""A teacher's distribution by a few of its entries: what is stored or sent where its hidden states cannot be.

Letters beside the house's: R rows (tokens), K entries of a row; C rows of a chunk, U width of the teacher, M draws,
B blocks of the vocabulary, I columns of a block.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

Kind = Literal["topk", "sample", "stratified"]
KINDS = get_args(Kind)
BLOCK = 512
"""Columns whose p are summed as one before a draw looks into them."""


class SparseTargets(NamedTuple):
    """The targets of R tokens (or [B, T] of them: every field's leading axes are the same), at temperature 1.

    The soft target of a token is the measure sum_k mass_k e_{id_k}, and `tail` on all other ids together. Three kinds:
    the k largest p and the rest as one bucket (`tail` > 0; biased off the k); n draws from p, each of mass 1/n, and
    the k largest p with m draws from the rest, each of mass p_rest/m (both `tail` = 0, and unbiased: the measure's
    expectation is p).
    """

    ids: jax.Array  # int32 [..., K]; -1 where an entry is unused; the first is the teacher's most likely token
    mass: jax.Array  # fp32 [..., K]; 0 where an entry is unused
    tail: jax.Array  # fp32 [...]; mass of all other ids together, as one bucket; 0 in the unbiased kinds
    lse: jax.Array  # fp32 [...], log sum exp of the teacher's logits
    entropy: jax.Array  # fp32 [...], of the teacher's whole distribution, nats
    label_logp: jax.Array  # fp32 [...], the teacher's log p of the label, nats
    present: jax.Array  # bool [...]; False where there is no target: the soft term is left out


def check(kind: str, top: int, draws: int) -> None:
    """ValueError, in a line, for what is no kind of sparse targets."""
    if kind not in KINDS:
        raise ValueError(f"sparse targets are one of {', '.join(KINDS)}, not {kind!r}")
    takes_top, takes_draws = kind != "sample", kind != "topk"
    if (top < 1) if takes_top else top:
        raise ValueError(f"targets of kind {kind} take {'a top of at least 1' if takes_top else 'no top'}, not {top}")
    if (draws < 1) if takes_draws else draws:
        need = "at least 1 draw" if takes_draws else "no draws"
        raise ValueError(f"targets of kind {kind} take {need}, not {draws}")


def entries(kind: str, top: int, draws: int) -> int:
    """K: the k largest and the draws; a sample also names the most likely token, first and with no mass of its own."""
    return max(top, 1) + draws if kind == "sample" else top + draws


def sparsify(
    h_RU: Float[Array, "R U"],
    w_UV: Float[Array, "U V"],
    labels_R: Int[Array, "R"],
    names_R: UInt32[Array, "R"],
    key: jax.Array,
    kind: Kind = "stratified",
    top: int = 32,
    draws: int = 16,
    chunk: int = 1024,
    columns: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
) -> SparseTargets:
    """A teacher's p = softmax(h W), in fp32, as `SparseTargets` with fields [R, K] and [R]; constants to autodiff.

    `topk`: the `top` largest p (the lower id first among equals), and their complement as `tail`. `sample`: `draws`
    ids from p with replacement, each of mass 1/draws, behind the most likely id with mass 0. `stratified`: the `top`
    largest, and `draws` ids from the others, in proportion to p, each of mass p_rest/draws. An id drawn twice is two
    entries; where nothing is left to draw from (p_rest = 0), entries are unused.

    A draw is the id at which the running sum of p, in the order of ids, first exceeds u times its total; u comes from
    `key` and the row's own number in `names_R` (`uniforms`), so a row's draws do not depend on the rows beside it, on
    the chunk, or (but for the rounding of p) on the mesh.

    `columns`, `rows`, `chunk`: as in `api.vocab_loss`: the mesh axes over which the columns of W are split, those of
    them along which devices have rows of their own, and a device's rows at a time. No [R, V] array exists.
    """
    check(kind, top, draws)
    R, V = h_RU.shape[0], w_UV.shape[1] * math.prod(jax.lax.axis_size(name) for name in columns)
    if top > V:
        raise ValueError(f"the {top} most likely tokens of a vocabulary of {V} are asked for")
    chunk = min(chunk, R)

    def cut(x):
        x = jnp.pad(x, [(0, -R % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    def step(x):
        h_CU, labels_C, names_C = x if not rows else [jax.lax.all_gather(of, rows, tiled=True) for of in x]
        out = _chunk(h_CU, w_UV, labels_C, uniforms(key, names_C, draws), kind, top, columns)
        mine = jax.lax.axis_index(rows) * chunk if rows else 0
        return out if not rows else jax.tree.map(lambda o: jax.lax.dynamic_slice_in_dim(o, mine, chunk), out)

    out = jax.lax.map(step, jax.tree.map(cut, (h_RU, labels_R, names_R)))
    return jax.lax.stop_gradient(jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:])[:R], out))


def uniforms(key: jax.Array, names_R: UInt32[Array, "R"], draws: int) -> Float[Array, "R {draws}"]:
    """Uniform on [0, 1): those of a row depend on the key and its name alone."""
    return jax.vmap(lambda name: jax.random.uniform(jax.random.fold_in(key, name), (draws,)))(names_R)


def _chunk(h_CU, w_UV, labels_C, u_CM, kind: str, top: int, axes: tuple[str, ...]) -> SparseTargets:
    """The targets of a chunk, whole on every device that has a part of the columns."""
    z_CV = jnp.einsum("CU,UV->CV", h_CU, w_UV, preferred_element_type=jnp.float32)
    begin = jax.lax.axis_index(axes) * z_CV.shape[1] if axes else 0
    best_C = jnp.max(z_CV, axis=-1)
    best_C = jax.lax.pmax(best_C, axes) if axes else best_C
    lse_C = best_C + jnp.log(_psum(jnp.sum(jnp.exp(z_CV - best_C[:, None]), axis=-1), axes))
    p_CV = jnp.exp(z_CV - lse_C[:, None])
    entropy_C = lse_C - _psum(jnp.sum(jnp.where(p_CV > 0, p_CV * z_CV, 0.0), axis=-1), axes)
    column_C = labels_C - begin
    mine_C = (column_C >= 0) & (column_C < z_CV.shape[1])
    label_C = jnp.take_along_axis(z_CV, jnp.where(mine_C, column_C, 0)[:, None], axis=1)[:, 0]
    label_logp_C = _psum(jnp.where(mine_C, label_C, 0.0), axes) - lse_C

    z_CK, ids_CK = _largest(z_CV, max(top, 1), begin, axes)
    mass_CK = jnp.exp(z_CK - lse_C[:, None])
    if kind == "sample":
        rest_CV, mass_CK = p_CV, jnp.zeros_like(mass_CK)
    else:  # by comparison with the last one, as a scatter into [C, V] is slow where there are no caches
        last_C, id_C, all_V = z_CK[:, -1:], ids_CK[:, -1:], begin + jnp.arange(z_CV.shape[1])[None]
        rest_CV = jnp.where((z_CV < last_C) | ((z_CV == last_C) & (all_V > id_C)), p_CV, 0.0)
    rest_C = _psum(jnp.sum(rest_CV, axis=-1), axes)
    if draws := u_CM.shape[1]:
        drawn_CM = jnp.where(rest_C[:, None] > 0, _draw(rest_CV, u_CM, begin, axes), -1)
        each_C = jnp.ones_like(rest_C) / draws if kind == "sample" else rest_C / draws
        ids_CK = jnp.concatenate([ids_CK, drawn_CM], axis=1)
        mass_CK = jnp.concatenate([mass_CK, jnp.broadcast_to(each_C[:, None], drawn_CM.shape)], axis=1)
    tail_C = rest_C if kind == "topk" else jnp.zeros_like(rest_C)
    present_C = jnp.ones(lse_C.shape, bool)
    return SparseTargets(ids_CK, mass_CK, tail_C, lse_C, entropy_C, label_logp_C, present_C)


def _largest(z_CV, top: int, begin, axes: tuple[str, ...]):
    """(values, global ids) of the `top` largest logits of all columns, falling; the lower id first among equals."""
    z_CK, ids_CK = jax.lax.top_k(z_CV, min(top, z_CV.shape[1]))
    ids_CK = ids_CK + begin
    if axes:
        z_CK, ids_CK = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (z_CK, ids_CK))
        z_CK, order_CK = jax.lax.top_k(z_CK, top)
        ids_CK = jnp.take_along_axis(ids_CK, order_CK, axis=1)
    return z_CK, ids_CK


def _draw(p_CV, u_CM, begin, axes: tuple[str, ...]):
    """Global ids at the shares `u` of the running sum of p over all columns: by device, then block, then column.

    So a sum has few terms, and is as good in fp32 as the terms are, and a search looks at few places.
    """
    block = min(BLOCK, p_CV.shape[1])
    p_CBI = jnp.pad(p_CV, [(0, 0), (0, -p_CV.shape[1] % block)]).reshape(p_CV.shape[0], -1, block)
    blocks_CB = p_CBI.sum(axis=-1)
    of_devices = jax.lax.all_gather(blocks_CB.sum(axis=-1), axes, axis=1) if axes else blocks_CB.sum(-1, keepdims=True)
    u_CM = u_CM * of_devices.sum(axis=-1, keepdims=True)
    device_CM, u_CM = _descend(of_devices[:, None], u_CM)
    block_CM, u_CM = _descend(blocks_CB[:, None], u_CM)
    inside_CM, _ = _descend(jnp.take_along_axis(p_CBI, block_CM[:, :, None], axis=1), u_CM)
    ids_CM = begin + block_CM * block + inside_CM
    return jax.lax.psum(jnp.where(device_CM == jax.lax.axis_index(axes), ids_CM, 0), axes) if axes else ids_CM


def _descend(p_CMI, u_CM):
    """The first place at which the running sum of p over I exceeds u, and what is left of u there."""
    sums_CMI = jnp.cumsum(p_CMI, axis=-1)
    u_CM = jnp.minimum(u_CM, jnp.nextafter(sums_CMI[..., -1], jnp.float32(0)))  # it may be rounded up to the whole
    at_CM = jnp.minimum(jnp.sum(sums_CMI <= u_CM[..., None], axis=-1), p_CMI.shape[-1] - 1)
    before_CMI = jnp.broadcast_to(sums_CMI - p_CMI, (*u_CM.shape, p_CMI.shape[-1]))
    return at_CM, jnp.maximum(u_CM - jnp.take_along_axis(before_CMI, at_CM[..., None], axis=-1)[..., 0], 0.0)


def _psum(x, axes: tuple[str, ...]):
    return jax.lax.psum(x, axes) if axes else x
