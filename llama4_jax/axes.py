"""The letters, the logical axes, and how weights are stored on a mesh and fetched for use.

Letters (a suffix names an array's shape, an einsum string uses the same letters):
  B batch   T query position   S key position   D embed   N query heads   K key/value heads   G = N/K   H head dim
  F ffn   E experts   R rows (tokens, flattened)   V vocabulary   L layers   P patches

A weight is declared once by `param`: shape, logical axes and init. `Execution` maps logical axes to mesh axes.
The model runs inside one `shard_map` (or on one device) on *local* shards. Collectives are written where they
happen, through the helpers below, which do nothing for a mesh axis that is absent or of size 1; so the same code
runs unsharded.

**Shares.** Gradients are taken inside the `shard_map`, where each device's loss is its *share*: the shares of all
devices sum to the loss. A transposed collective then is exact (`psum` transposes to `psum`, `all_gather` to a
reduce-scatter), and a device's gradient for a weight is a share too: what is left to do is to sum it over the mesh
axes the weight is replicated on (`Execution.sum_shares`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama4_jax import quant

REPLICA, FSDP, EXPERT, CONTEXT, TENSOR = MESH_AXES = ("replica", "fsdp", "expert", "context", "tensor")
BATCH_AXES = (REPLICA, FSDP, EXPERT)  # the batch dimension of activations is split over these
TOKEN_AXES = (*BATCH_AXES, CONTEXT)  # and the tokens over these: B over the batch axes, T over context

VOCAB_AXES = (TENSOR, EXPERT)  # the vocabulary stays split over these in use, too

RULES: dict[str, tuple[str, ...]] = {
    "experts": (EXPERT,),
    "vocab": VOCAB_AXES,
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "ffn": (TENSOR,),
    "embed": (FSDP, EXPERT, CONTEXT),
    "tower": (FSDP, EXPERT, CONTEXT),  # of those, as many as divide its width (`training/state.py`)
}
"""Where each logical axis is stored. Within one weight a mesh axis goes to the logical axis that stands first here."""

TOGETHER = 2**27
"""Weights of at most so many elements are gathered as one array, and their gradients summed as one: a collective costs
a TPU's compiler seconds and the network a start. Of larger ones only those of one shape are, side by side, as they are
used; to take others apart would be a copy."""
Gathers = tuple[tuple[int, tuple[str, ...]], ...]


def axis_size(names: tuple[str, ...] | str) -> int:
    """Size of a mesh axis, or product of several, inside the enclosing `shard_map`; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names if name in mesh.manual_axes)


def present(names: tuple[str, ...] | str) -> tuple[str, ...]:
    """Those of the mesh axes that the enclosing `shard_map` splits in more than one."""
    return tuple(n for n in ((names,) if isinstance(names, str) else names) if axis_size(n) > 1)


def psum(x: Any, names: tuple[str, ...] | str) -> Any:
    """Sum over mesh axes; a tree goes through as one."""
    return jax.lax.psum(x, axes) if (axes := present(names)) else x


def all_gather(x: jax.Array, names: tuple[str, ...] | str, dim: int) -> jax.Array:
    """Concatenate the shards of dimension `dim` over mesh axes."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if (axes := present(names)) else x


def psum_scatter(x: jax.Array, names: tuple[str, ...] | str, dim: int) -> jax.Array:
    """Sum over mesh axes, of which each device keeps its shard of dimension `dim`: the transpose of `all_gather`."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if (axes := present(names)) else x


def axis_index(names: tuple[str, ...] | str) -> jax.Array | int:
    """This device's place along a mesh axis, or along several, the last fastest."""
    return jax.lax.axis_index(axes) if (axes := present(names)) else 0


_UNDRAWN = ContextVar("undrawn", default=False)


@contextmanager
def undrawn() -> Iterator[None]:
    """Within it `param` draws nothing, for those who want shapes alone: tracing its draws takes most of a second."""
    token = _UNDRAWN.set(True)
    try:
        yield
    finally:
        _UNDRAWN.reset(token)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None, fp32: bool = False
) -> nnx.Param:
    """Declare a weight: its shape, the logical name of each dimension, and its init.

    `std`: standard deviation of a normal truncated at three of them; None starts at ones (a scale), 0 at zeros.
    `fp32`: the weight is used in fp32 whatever the compute dtype (the router).
    Layers are stacked by `nnx.vmap` in front of these dimensions; `axes` never counts that one, so a rule that
    asks for a weight's rank asks for `len(axes)`.
    """
    assert len(shape) == len(axes)
    if not std or _UNDRAWN.get():  # which draws nothing: other weights are the same with it and without
        value = jnp.full(shape, 1.0 if std is None else 0.0, jnp.float32)
    else:
        value = std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes, fp32=fp32)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def map_params(f: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """Map over the weights of a state, each with its declaration (`.axes`, `.fp32`), keeping the tree."""
    return jax.tree.map(f, state, *rest, is_leaf=is_variable)


@dataclass(frozen=True)
class Execution:
    """How a model runs, as opposed to what it is: nothing here changes the result but by rounding."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the weights as used; masters stay fp32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over the mesh."""
    remat: Literal["none", "attention", "layer", "block", "nested"] = "block"
    """What the backward pass recomputes: nothing; each layer from its input but for what attention keeps (its output
    and a logsumexp); each layer from its input; each period of layers from its input, whose gathered weights then live
    together; or both, twice the work for the least memory."""
    offload: bool = False
    """The inputs that layers, or periods of them, are recomputed from wait in the host's memory."""
    attention: str = "blockwise"
    """Backend of `kernels/attention`."""
    exchange: Literal["gather", "mirror", "heads"] = "gather"
    """What crosses the context axis in global layers: keys and values, to queries as they lie (`gather`) or dealt out
    evenly (`mirror`); or heads in exchange for sequence (`heads`)."""
    grouped_matmul: str = "blocks"
    """Backend of `kernels/grouped_matmul`."""
    dispatch: Literal["fsdp", "all_to_all", "ragged_all_to_all"] = "fsdp"
    """How tokens and experts meet: the experts' weights are gathered (`fsdp`), or tokens travel over the expert axis,
    in buffers of `capacity` an expert (`all_to_all`) or of `capacity` a device (`ragged_all_to_all`)."""
    capacity: float = 1.25
    """Room for routed tokens under `all_to_all` and `ragged_all_to_all`, times what a balanced router would need."""
    quant: quant.Quant = "none"
    """Eight bits in the matmuls of projections, SwiGLU and experts (`llama4_jax/quant.py`); the embedding, attention's
    scores and values, the router and the head are not quantised."""
    platform: Literal["cpu", "tpu", "gpu"] = "cpu"
    """What the program is compiled for."""
    rules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: RULES)
    """Logical axis -> mesh axes it is stored over."""

    def __post_init__(self):
        quant.check_grouped(self.quant, self.dispatch, self.grouped_matmul)

    def einsum(self, spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Activations with a weight, in eight bits where `quant` says so."""
        return quant.einsum(spec, x, w, self.quant)

    def stored_over(self, axes: tuple[str | None, ...], ndim: int) -> list[tuple[str, ...]]:
        """Mesh axes of each dimension of a weight; leading stacked dimensions are not split."""
        split: dict[str, tuple[str, ...]] = {}
        for name, mesh_axes in self.rules.items():
            if name in axes:
                split[name] = tuple(a for a in mesh_axes if not any(a in others for others in split.values()))
        return [()] * (ndim - len(axes)) + [split.get(name or "", ()) for name in axes]

    def spec(self, axes: tuple[str | None, ...], ndim: int) -> P:
        """PartitionSpec of a weight."""
        return P(*(names or None for names in self.stored_over(axes, ndim)))

    def specs(self, state: Any) -> Any:
        """PartitionSpecs of a state (or of any tree with weights in it, such as Adam's moments)."""
        return jax.tree.map(
            lambda p: p.replace(self.spec(p.axes, p.get_value().ndim)) if is_variable(p) else P(),
            state, is_leaf=is_variable,
        )  # fmt: skip

    def fetch(self, state: Any) -> Any:
        """Stored shards -> weights for use: cast to the compute dtype, gathered over all axes but `tensor`; and not
        over `expert` where tokens travel: to the vocabulary's columns always, to the experts by choice of `dispatch`.

        Backward: the gradient's shares are reduce-scattered in `reduce_dtype`, back to the fp32 shards.
        """

        reduce_dtype, in_front = jnp.dtype(self.reduce_dtype), self.platform == "gpu"
        leaves, tree = jax.tree.flatten(state, is_leaf=is_variable)
        together: dict[Any, list[int]] = {}
        for i, p in enumerate(leaves):
            dtype = jnp.dtype(jnp.float32 if p.fp32 else self.compute_dtype)
            gathers, shape = self.gathered(p), p.get_value().shape
            ways = math.prod(axis_size(axes) for _, axes in gathers)
            if len(gathers) == 1 and math.prod(shape) * ways <= TOGETHER:
                key = gathers[0][1]
            else:
                key = (gathers, shape) if gathers and gathers[-1][0] < len(shape) - 1 else i
            together.setdefault((key, dtype), []).append(i)
        with jax.named_scope("fetch"):
            for (_, dtype), some in together.items():
                values, gathers = [leaves[i].get_value() for i in some], tuple(self.gathered(leaves[i]) for i in some)
                for i, w in zip(some, _gather(values, gathers, dtype, reduce_dtype, in_front), strict=True):
                    leaves[i] = leaves[i].replace(w)
        return tree.unflatten(leaves)

    def gathered(self, p: nnx.Variable) -> Gathers:
        """(dimension, mesh axes) of what `fetch` gathers of a weight."""
        travel = "vocab" in p.axes or ("experts" in p.axes and self.dispatch != "fsdp")  # the tokens, over `expert`
        stay = {TENSOR, EXPERT} if travel else {TENSOR}
        return tuple(
            (dim, axes)
            for dim, names in enumerate(self.stored_over(p.axes, p.get_value().ndim))
            if (axes := present(tuple(n for n in names if n not in stay)))
        )

    def fetch_module(self, module: Any) -> Any:
        """`fetch` for a whole module."""
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, self.fetch(state))

    def sum_shares(self, grads: Any) -> Any:
        """Sum each gradient over the mesh axes its weight is replicated on; fp32 comes back."""

        def one(g: nnx.Param) -> nnx.Variable:
            value = g.get_value()
            stored = {name for names in self.stored_over(g.axes, value.ndim) for name in names}
            copies = tuple(name for name in MESH_AXES if name not in stored)
            return g.replace(psum(value.astype(self.reduce_dtype), copies).astype(jnp.float32))

        return map_params(one, grads)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
    weights: list[jax.Array], gathers: tuple[Gathers, ...], dtype, reduce_dtype, in_front: bool
) -> list[jax.Array]:
    """Cast, then gather the dimensions named in `gathers`; its transpose sums in `reduce_dtype`.

    `in_front`: gathered as a new first dimension, which is then moved to its place. XLA gathers on GPUs along the
    dimension that is outermost in memory alone; asked for another one, it may lay out all layers' stored weights so
    before it loops over them: one more copy of them in fp32 that lives through the step (Maverick's 12 GiB of 68 on
    128 H100s). TPUs gather along any dimension, and would move for nothing.

    Several weights travel as one: those of one shape side by side in their last dimension, others flat, which have one
    such dimension each, over the same mesh axes.
    """
    weights = [w.astype(dtype) for w in weights]
    if _side_by_side(weights, gathers):
        w = jnp.concatenate(weights, axis=-1)
        for dim, axes in gathers[0]:
            if in_front:
                shape = w.shape
                w = jnp.moveaxis(jax.lax.all_gather(w, axes), 0, dim).reshape(*shape[:dim], -1, *shape[dim + 1 :])
            else:
                w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
        return jnp.split(w, len(weights), axis=-1)
    axes = gathers[0][0][1]
    flat = jax.lax.all_gather(jnp.concatenate([w.reshape(-1) for w in weights]), axes)
    ends = list(itertools.accumulate(w.size for w in weights))
    parts = jnp.split(flat, ends[:-1], axis=1)
    return [
        jnp.moveaxis(part.reshape(-1, *w.shape), 0, dim).reshape(*w.shape[:dim], -1, *w.shape[dim + 1 :])
        for part, w, ((dim, _),) in zip(parts, weights, gathers, strict=True)
    ]


def _side_by_side(weights: list[jax.Array], gathers: tuple[Gathers, ...]) -> bool:
    """Whether the weights, stored or whole, have one shape, and a last dimension that is not gathered."""
    if len(weights) == 1:
        return True
    alike = len({w.shape for w in weights}) == len(set(gathers)) == 1
    return alike and all(dim < weights[0].ndim - 1 for dim, _ in gathers[0])


def _gather_fwd(weights, gathers, dtype, reduce_dtype, in_front):
    return _gather(weights, gathers, dtype, reduce_dtype, in_front), None


def _gather_bwd(gathers, dtype, reduce_dtype, in_front, _, grads):
    grads = [g.astype(reduce_dtype) for g in grads]
    if _side_by_side(grads, gathers):
        g = jnp.concatenate(grads, axis=-1)
        for dim, axes in reversed(gathers[0]):
            g = jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
        return (jnp.split(g.astype(jnp.float32), len(grads), axis=-1),)
    axes = gathers[0][0][1]
    devices = axis_size(axes)
    shapes = [(*g.shape[:dim], g.shape[dim] // devices, *g.shape[dim + 1 :])
              for g, ((dim, _),) in zip(grads, gathers, strict=True)]  # fmt: skip
    parts = [
        jnp.moveaxis(g.reshape(*shape[:dim], devices, *shape[dim:]), dim, 0).reshape(devices, -1)
        for g, shape, ((dim, _),) in zip(grads, shapes, gathers, strict=True)
    ]
    flat = jax.lax.psum_scatter(jnp.concatenate(parts, axis=1), axes).astype(jnp.float32)
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    return ([g.reshape(shape) for g, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)],)


_gather.defvjp(_gather_fwd, _gather_bwd)
