"""AdamW, Adafactor and Muon under a warmup-stable-decay schedule; logical axes decide which weights are matrices.

A rank cannot decide: layers are stacked in front of the logical axes, which makes a matrix of a norm's scale and an
array of rank four of an expert's matrices. Every statistic here is of one matrix, of one block and one expert.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llama4_jax.axes import Execution, axis_size, is_variable, map_params, present
from llama4_jax.vision import is_projector, is_vision
from training.config import OptimizerConfig


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[..., jax.Array]:
    """Rate at each step: linear warm-up, the peak held, a linear fall over the last `decay` share of the steps.

    Steps are counted from 0, those of the schedule from `cfg.start` to `steps`. Of its first one the rate is
    peak/warmup, not 0, so that no step is lost; `final` is where the fall would come to after the last step.
    """
    warmup = min(cfg.warmup, steps - cfg.start)
    start = cfg.fall_start(steps)

    def schedule(step):
        rise = (step - cfg.start + 1) / max(warmup, 1)
        fall = 1 - (1 - cfg.final) * (step - start) / max(steps - start, 1)
        return cfg.learning_rate * jnp.minimum(jnp.minimum(rise, 1.0), jnp.clip(fall, cfg.final, 1.0))

    return schedule


def decays(params: Any) -> Any:
    """True for weights with at least two logical axes: matrices, not scales, stacked over layers or not."""
    return map_params(lambda p: p.replace(len(p.axes) >= 2), params)


def held(cfg: OptimizerConfig | None, params: nnx.State) -> nnx.State:
    """The weights, with no gradient through those that `cfg.vision` holds."""
    if cfg is None or cfg.vision == "all":
        return params
    flat = [(path, p if _learns(cfg, path) else p.replace(jax.lax.stop_gradient(p.get_value())))
            for path, p in nnx.to_flat_state(params)]  # fmt: skip
    return nnx.from_flat_state(flat)


def _learns(cfg: OptimizerConfig, path: tuple[Any, ...]) -> bool:
    if cfg.vision == "all" or not is_vision(path):
        return True
    return cfg.vision == "projector" and is_projector(path)


def make_optimizer(cfg: OptimizerConfig, steps: int, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """w -= rate (u + weight_decay w), the decay decoupled (Loshchilov & Hutter, 1711.05101) and of matrices only.

    u is the direction that `cfg.kind` makes of the gradient g, clipped to a global norm of `clip`:

    * adamw: m / (sqrt(v) + eps), m and v running means of g and g^2, corrected for starting at zero.
    * adafactor: `scale_by_factored_moment`.
    * muon: `scale_by_muon` for the hidden layers' matrices, adamw's for all else.

    What `cfg.vision` holds has no moments and does not move. `mesh` is where the weights lie, None on one device: it
    changes where muon works, not what comes of it.
    """
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moment_dtype)
    direction = {
        "adamw": adam,
        "adafactor": scale_by_factored_moment(cfg.b2, cfg.eps),
        "muon": in_two(lambda _, p: is_hidden_matrix(p), scale_by_muon(cfg.b1, cfg.moment_dtype, mesh), adam),
    }[cfg.kind]
    if cfg.vision != "all":
        direction = in_two(lambda path, _: _learns(cfg, path), direction, optax.set_to_zero())

    def decayed(params: Any) -> Any:
        if cfg.vision == "all":
            return decays(params)
        flat = nnx.to_flat_state(decays(params))
        return nnx.from_flat_state([(path, p.replace(p.get_value() and _learns(cfg, path))) for path, p in flat])

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        direction,
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(cfg, steps)),
    )


# --- What of a weight is a matrix

Dims = tuple[int, ...]


def matrix_dims(p: nnx.Variable) -> tuple[Dims, Dims]:
    """The weight's dimensions, counted from its end, that are a matrix's rows and its columns; a vector has no rows.

    Experts have a matrix each, and so has each block. A side may have several dimensions: every matrix reads from or
    writes to the residual stream, so `embed` (`tower` in the vision part) is one side and all else the other (wq
    [D, N, H] is D x NH).
    ValueError for a weight of which that does not say where its sides meet.
    """
    axes = p.axes[1:] if p.axes[:1] == ("experts",) else p.axes
    dims = tuple(range(-len(axes), 0))
    if len(axes) < 2:
        return (), dims
    stream = ("embed", "tower")
    if len(axes) > 2 and axes[0] not in stream and axes[-1] not in stream:
        raise ValueError(f"a weight with axes {p.axes} is no matrix: of three or more, embed must be first or last")
    cut = 1 if len(axes) == 2 or axes[0] in stream else len(axes) - 1
    return dims[:cut], dims[cut:]


def is_hidden_matrix(p: nnx.Variable) -> bool:
    """True for the matrices of attention and feed-forward layers: not embedding, unembedding, router or scales, and
    none of the vision tower's, which is small and lies unevenly."""
    return bool(matrix_dims(p)[0]) and not {"vocab", "tower"} & set(p.axes) and not p.fp32


# --- Adafactor


class Factors(NamedTuple):
    """Running means of a matrix's squared gradient, over its columns and over its rows."""

    row: nnx.Variable
    col: nnx.Variable


class FactoredState(NamedTuple):
    count: Any  # int32 [], updates done
    v: Any  # of each weight `Factors`, or for a vector the whole second moment


def scale_by_factored_moment(b2: float, eps: float) -> optax.GradientTransformation:
    """Adafactor without momentum and relative step sizes (Shazeer & Stern, 1804.04235).

    Of each matrix only the means of s = g^2 + eps^2 over columns, r, and over rows, c, are kept:
        v = r c / mean(r),   u = g / sqrt(v),   u /= max(1, rms(u)),
    with a decay that rises as 1 - t^-0.8 to at most `b2` (Zhai et al., 2106.04560). Vectors keep all of v.
    `optax.scale_by_factored_rms` factors the two largest dimensions, which may be the layers or the experts.
    """

    def init(params):
        def zeros(p: nnx.Variable) -> Factors | nnx.Variable:
            rows, cols = matrix_dims(p)
            zero = p.replace(jnp.zeros_like(p.get_value()))
            return Factors(_mean(zero, cols), _mean(zero, rows)) if rows else zero

        return FactoredState(jnp.int32(0), map_params(zeros, params))

    def update(updates, state, params=None):
        decay = jnp.minimum(1 - (state.count + 1.0) ** -0.8, b2)

        def moved(old: nnx.Variable, new: nnx.Variable) -> nnx.Variable:
            return old.replace(decay * old.get_value() + (1 - decay) * new.get_value())

        def one(p: nnx.Variable, v: Factors | nnx.Variable) -> tuple[nnx.Variable, Factors | nnx.Variable]:
            g, (rows, cols) = p.get_value(), matrix_dims(p)
            s = p.replace(jnp.square(g) + eps**2)
            if isinstance(v, Factors):
                v = Factors(moved(v.row, _mean(s, cols)), moved(v.col, _mean(s, rows)))
                row, col = jnp.expand_dims(v.row.get_value(), cols), jnp.expand_dims(v.col.get_value(), rows)
                u = g * jax.lax.rsqrt(row / row.mean(rows, keepdims=True)) * jax.lax.rsqrt(col)
            else:
                v = moved(v, s)
                u = g * jax.lax.rsqrt(v.get_value())
            rms = jnp.sqrt(jnp.mean(jnp.square(u), rows + cols, keepdims=True))
            return p.replace(u / jnp.maximum(rms, 1.0)), v

        pairs = map_params(one, updates, state.v)
        directions, v = (map_params(lambda _, pair, i=i: pair[i], updates, pairs) for i in (0, 1))
        return directions, FactoredState(state.count + 1, v)

    return optax.GradientTransformation(init, update)


def _mean(p: nnx.Variable, dims: Dims) -> nnx.Variable:
    """Mean over some dimensions; the logical axes of the others stay with it."""
    axes = tuple(name for i, name in enumerate(p.axes, start=-len(p.axes)) if i not in dims)
    return p.replace(p.get_value().mean(dims), axes=axes)


# --- Muon


class Parts(NamedTuple):
    """Two optimizers' states, each with its own weights alone."""

    chosen: Any
    others: Any


def in_two(
    choose: Callable[[tuple[Any, ...], nnx.Variable], bool],
    chosen: optax.GradientTransformation,
    others: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """One transformation for the weights that `choose` picks, another for the others; neither may need the weights."""

    def split(tree: Any) -> Any:
        return nnx.split_state(tree, choose, ...)

    def init(params):
        first, second = split(params)
        return Parts(chosen.init(first), others.init(second))

    def update(updates, state, params=None):
        first, second = split(updates)
        first, chosen_state = chosen.update(first, state.chosen)
        second, others_state = others.update(second, state.others)
        merged: Any = nnx.merge_state(first, second)  # pyright: ignore[reportArgumentType]
        return merged, Parts(chosen_state, others_state)

    return optax.GradientTransformation(init, update)


def scale_by_muon(momentum: float, dtype: str, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """u = 0.2 sqrt(max(rows, columns)) orthogonal(g + b m), with m = g + b m: Nesterov's momentum, b = `momentum`.

    Muon (Jordan et al., 2024); the factor gives u the RMS of an Adam update whatever the shape, so that one learning
    rate and one decay serve both (Moonlight, 2502.16982). All else but matrices is left to Adam, as usual: `in_two`.
    `optax.contrib.muon` picks arrays of rank two, which with stacked layers are the scales and none of the matrices.

    A mesh stores a matrix in parts and its products need it whole: alike matrices are dealt out over the devices that
    share them by one all-to-all and come back by another, each of no more than a device's own shards. m matrices on n
    devices cost each ceil(m / n) times 10 min^2 max + 5 min^3 multiply-adds, whatever the batch, and room for three
    times its shards. (Left to XLA, each of the five iterations moves every matrix to every device.)
    """
    run = Execution()

    def orthogonal(updates: Any) -> Any:
        leaves, tree = jax.tree.flatten(updates, is_leaf=is_variable)
        alike: dict[Layout, list[int]] = {}
        for i, p in enumerate(leaves):
            alike.setdefault(layout(p, run), []).append(i)
        for kind, members in alike.items():
            shards = [leaves[i].get_value().reshape(-1, *kind.shape) for i in members]
            done = orthogonal_shards(jnp.concatenate(shards), kind)
            ends = list(itertools.accumulate(len(x) for x in shards))
            for i, u in zip(members, jnp.split(done, ends[:-1]), strict=True):
                leaves[i] = leaves[i].replace(u.reshape(leaves[i].get_value().shape))
        return tree.unflatten(leaves)

    def everywhere(updates: Any, _: Any) -> Any:
        if mesh is None:
            return orthogonal(updates)
        specs = run.specs(updates)
        return jax.shard_map(orthogonal, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(updates)

    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=dtype), optax.stateless(everywhere)
    )  # fmt: skip


class Layout(NamedTuple):
    """A matrix in a device's shard of a weight."""

    shape: Dims  # of the shard of it
    rows: Dims
    cols: Dims
    split: tuple[tuple[int, tuple[str, ...]], ...]  # dimensions, with the mesh axes they are split over


def layout(p: nnx.Variable, run: Execution) -> Layout:
    """How each matrix of a weight lies on this device."""
    rows, cols = matrix_dims(p)
    shape = p.get_value().shape
    stored = run.stored_over(p.axes, len(shape))
    split = tuple((dim, axes) for dim in rows + cols if (axes := present(stored[dim])))
    return Layout(shape[-len(rows + cols) :], rows, cols, split)


def orthogonal_shards(some: jax.Array, at: Layout) -> jax.Array:
    """Shards [matrices, ...] of matrices, to the shards of what `scale_by_muon` makes of them."""
    count, inner = some.shape[0], some.ndim - 1
    sharers = math.prod(axis_size(name) for _, axes in at.split for name in axes)
    some = jnp.pad(some, [(0, -count % sharers)] + [(0, 0)] * inner)  # zeros stay zeros
    for dim, axes in at.split:
        some = jax.lax.all_to_all(some, axes, 0, some.ndim + dim, tiled=True)
    rows, cols = (math.prod(some.shape[i] for i in dims) for dims in (at.rows, at.cols))
    u = jax.lax.map(lambda x: 0.2 * math.sqrt(max(rows, cols)) * orthogonalise(x), some.reshape(-1, rows, cols))
    u = u.reshape(some.shape)
    for dim, axes in reversed(at.split):
        u = jax.lax.all_to_all(u, axes, u.ndim + dim, 0, tiled=True)
    return u[:count]


def orthogonalise(x: jax.Array) -> jax.Array:
    """About U V^T of a matrix U S V^T: its singular values come to lie in 0.7 to 1.2.

    Five Newton-Schulz steps x <- a x + (b A + c A^2) x with A = x x^T, from x of unit Frobenius norm; a, b and c are
    Jordan's, chosen for the steepest rise of small singular values and not for convergence to exactly 1.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T).T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
