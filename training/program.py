"""What a training step costs, counted in its jaxpr: FLOPs, bytes of collectives, bytes of HBM. Nothing is compiled.

`walk` goes through every equation with how often it runs; `count` traces a run's step on a mesh of any devices, real
or standing in for some (`training/chips.py`), and adds up. Everything is of one device and one step.

**Kernels.** Their trips depend on the data, and vendors' libraries may be absent, so the step is traced with each
kernel as what it computes (`whole_kernels`): attention as one block of all queries and keys, of which the share that
causality leaves of rows of one document counts, and an experts' matmul as one ragged product of the rows that exist.
Each stands for any backend, with what a flash kernel does twice (scores again in the backward pass). A kernel that
does more (`mosaic_gpu` forms scores and their gradients for dq once again, and against gathered keys does not skip)
takes longer than this says. Under `gather` devices have unequal causal work: the mean counts.

**Branches.** A loop over layers of both kinds chooses the attention as it runs; its `cond` is taken by each kind as
often as the layers of the loop, which its scope names, are of it. A choice nothing is known of counts as NaN, and
`count` refuses a program whose total depends on one.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from llama4_jax.kernels.attention import blockwise
from llama4_jax.kernels.grouped_matmul import blocks
from training.ahead import abstract_batch
from training.config import Learner, RunConfig
from training.flops import step_per_token
from training.hlo import sends
from training.state import abstract_state, execution
from training.step import make_train_step

# --- The walk

Scope = tuple[str, ...]
"""Names given by `jax.named_scope` (and by einsum), outermost first; transformations are left out."""
Weigh = Callable[[Scope], Sequence[float] | None]
"""The shares of its calls that a `cond` at a scope goes through each branch (False first); None where not known."""

AGAIN = "rematted_computation"
"""JAX's scope of what a backward pass computes again."""


class Equation(NamedTuple):
    """An equation of a program or of one inside it."""

    eqn: Any
    trips: float  # how often it runs; NaN where that is not known
    scope: Scope
    local: bool  # inside a `shard_map`: its shapes are one device's
    backward: bool  # in the transpose of something, where what was not kept is computed again, too

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that it communicates over or asks its place on."""
        names = self.eqn.params.get("axis_name", self.eqn.params.get("axes", ()))
        names = names if isinstance(names, tuple) else (names,)
        return tuple(name for name in names if isinstance(name, str))


def walk(
    jaxpr: Any,
    weigh: Weigh = lambda scope: None,
    trips: float = 1.0,
    scope: Scope = (),
    local: bool = False,
    backward: bool = False,
) -> Iterator[Equation]:
    """Every equation of a jaxpr and of those inside it, but for kernels' own (`pallas_call`).

    The body of a `scan` runs as often as the scan is long, that of a `while` an unknown number of times.
    """
    for eqn in jaxpr.eqns:
        names = str(eqn.source_info.name_stack)
        here = scope + tuple(re.findall(r"[^/()]+(?=[/)]|$)", names))
        one = Equation(eqn, trips, here, local, backward or "transpose(" in names)
        yield one
        inner = [] if one.name == "pallas_call" else list(jaxprs_in_params(eqn.params))
        times: Sequence[float] = [1.0] * len(inner)
        if one.name == "scan":
            times = [eqn.params["length"]]
        elif one.name == "while":
            times = [math.nan] * len(inner)
        elif one.name == "cond":
            times = weigh(here) or [math.nan] * len(inner)
        for part, n in zip(inner, times, strict=True):
            yield from walk(part, weigh, trips * n, here, local or one.name == "shard_map", one.backward)


# --- Collectives


class Collective(NamedTuple):
    """A collective of one device: the same one everywhere in a part of the program, added up over a step.

    `operand`: bytes that go in. `wire`: bytes that a device sends, and as many that it receives, when n devices pass
    shards around a ring (all_gather (n-1) of its shard, reduce_scatter (n-1)/n of the whole, all_reduce both one
    after the other), or straight to each other ((n-1)/n of an all_to_all; of ragged_all_to_all as much, as a balanced
    router sends it; all of a ppermute for devices that send at all). What a torus forwards for others is not in it.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    learner: str
    part: str
    calls: float
    operand: float
    wire: float


KINDS = dict(psum="all_reduce", pmax="all_reduce", pmin="all_reduce") | {
    kind: kind for kind in ("all_gather", "reduce_scatter", "all_to_all", "ragged_all_to_all", "ppermute")
}


def kind_of(one: Equation) -> str | None:
    """What kind of collective an equation is, None if none."""
    return KINDS.get(one.name.removesuffix("_invariant")) if one.axes else None


def operands(one: Equation) -> list[Any]:
    """Shapes of what a collective sends; where rows go and the buffer they go to are none of it."""
    found = [x.aval for x in one.eqn.invars]
    return found[:1] if kind_of(one) == "ragged_all_to_all" else found


def nbytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


# --- Matrix products


def matmul_flops(eqn: Any) -> int:
    """Two for each multiply-add of a `dot_general`, or of a ragged one whose rows are all in some group; else 0."""
    if eqn.primitive.name == "dot_general":
        lhs, ((contracted, _), _) = eqn.invars[0].aval, eqn.params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs.shape[i] for i in contracted)
    if eqn.primitive.name == "ragged_dot_general":
        return 2 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[-1]
    return 0


class Flops(NamedTuple):
    """FLOPs of one device: computed once, and again in the backward pass because it was not kept.

    `once` is what the model needs, but for the room that capacity buffers leave empty (`dispatch="all_to_all"`).
    """

    once: float = 0.0
    again: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Flops:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def all(self) -> float:
        return self.once + self.again


# --- A run's step


@dataclass(frozen=True)
class Program:
    """What one device does in one step.

    `hbm`: bytes read and written, by `matmuls` (operands and results, each of its own; of attention without scores),
    `collectives` (operands and results) and `state` (weights and optimizer state read and written once, fp32
    gradients written and read). What is between products is taken to be fused into them, and nothing to stay in
    caches from one to the next: neither a lower nor an upper bound.
    """

    devices: int
    tokens: int  # of the global batch
    model_flops: float  # of all devices, nothing computed twice (`training/flops.py`)
    flops: dict[tuple[str, str], Flops]  # by learner and part (`training/flops.py`)
    collectives: tuple[Collective, ...]
    hbm: dict[str, float]

    @property
    def total(self) -> Flops:
        return sum(self.flops.values(), Flops())


def count(cfg: RunConfig, mesh: Mesh, domains: int = 1) -> Program:
    """Trace the run's step on the mesh and add up. Seconds for the largest model; needs no accelerator's library."""
    traced = replace(cfg, learners={name: _countable(learner, mesh) for name, learner in cfg.learners.items()})
    state = abstract_state(traced, mesh)
    with whole_kernels():
        step = make_train_step(traced, mesh, domains)
        jaxpr = jax.make_jaxpr(step)(state, abstract_batch(traced, mesh)).jaxpr

    def weigh(scope: Scope) -> Sequence[float] | None:
        local = local_share(cfg, scope)
        return None if local is None else (1 - local, local)

    flops: defaultdict[tuple[str, str], Flops] = defaultdict(Flops)
    sums: defaultdict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    hbm = dict(matmuls=0.0, collectives=0.0, state=_state_bytes(state))
    for one in walk(jaxpr, weigh):
        learner, part, trips = _learner(cfg, one.scope), _part(one.scope), one.trips
        if one.name == "pallas_call":
            raise ValueError(f"a kernel at {'/'.join(one.scope)} is not counted")
        if kind := kind_of(one):
            ways = sends(kind, math.prod(mesh.shape[name] for name in one.axes), one.eqn.params.get("perm", ()))
            for aval in operands(one):
                size = trips * nbytes(aval)
                found = sums[kind, one.axes, str(aval.dtype), learner, part]
                found[:] = found[0] + trips, found[1] + size, found[2] + size * ways
            hbm["collectives"] += trips * sum(map(nbytes, operands(one) + [x.aval for x in one.eqn.outvars]))
        if work := matmul_flops(one.eqn):
            trips /= 1 if one.local else mesh.size
            arrays = sorted((x.aval for x in (*one.eqn.invars[:2], *one.eqn.outvars)), key=nbytes)
            shares = {part: 1.0}
            if part.startswith("attention"):
                shares = _attention_shares(cfg, one.scope, part, arrays.pop().shape[-1])
            for of, share in shares.items():
                flops[learner, of] += _once_or_again(one, trips * work * share)
            hbm["matmuls"] += trips * sum(map(nbytes, arrays))
    if math.isnan(sum(map(sum, flops.values())) + sum(map(sum, sums.values()))):
        raise ValueError("the step's cost depends on a loop or a branch whose trips are not known")
    collectives = tuple(Collective(*key, *found) for key, found in sums.items())
    tokens = cfg.train.batch * cfg.train.seq_len
    return Program(mesh.size, tokens, float(tokens * step_per_token(cfg)), dict(flops), collectives, hbm)


@contextmanager
def whole_kernels() -> Iterator[None]:
    """Within it, `blockwise` attention is traced as one block, and the experts' `blocks` as one ragged product."""
    ragged: Any = jax.lax.ragged_dot
    with (
        mock.patch.object(blockwise, "BLOCK", sys.maxsize),
        mock.patch.multiple(blocks, ROWS=1, GROUP=1, grouped_matmul=ragged),
    ):
        yield


def _countable(learner: Learner, mesh: Mesh) -> Learner:
    """The learner on the kernels that `whole_kernels` makes whole; a balanced router fills a ragged buffer once."""
    capacity = 1.0 if learner.dispatch == "ragged_all_to_all" else learner.capacity
    exchange = execution(learner, mesh).exchange
    return replace(learner, attention="blockwise", grouped_matmul="blocks", exchange=exchange, capacity=capacity)


def local_share(cfg: RunConfig, scope: Scope) -> float | None:
    """Of the layers that a scope (`layers_FIRST_LAST` of a period) runs over, the share that attends locally."""
    for name in scope:
        if found := re.fullmatch(r"layers_(\d+)_(\d+)", name):
            first, last = map(int, found.groups())
            kinds = cfg.learners[_learner(cfg, scope)].model.pattern[first : last + 1]
            return sum(kind.local for kind in kinds) / len(kinds)
    return None


def _learner(cfg: RunConfig, scope: Scope) -> str:
    return scope[0] if scope and scope[0] in cfg.learners else ""


def _part(scope: Scope) -> str:
    """The innermost scope, but for einsum's own, those of layers, and the learner's."""
    named = [name for name in scope[1:] if name != AGAIN and "->" not in name and not re.match(r"layers?_\d", name)]
    return named[-1] if named else "other"


def _attention_shares(cfg: RunConfig, scope: Scope, part: str, keys: int) -> dict[str, float]:
    """What causality, and the chunks of local layers, leave of queries against `keys` keys, by kind of layer.

    `attention` is both kinds in one kernel, where a row is a chunk.
    """
    chunk = cfg.learners[_learner(cfg, scope)].model.chunk
    seen = dict(attention_local=(min(keys, chunk) + 1) / (2 * keys), attention_global=(keys + 1) / (2 * keys))
    if part in seen:
        return {part: seen[part]}
    local = local_share(cfg, scope) or 0.0
    return dict(
        attention_local=local * seen["attention_local"], attention_global=(1 - local) * seen["attention_global"]
    )


def _once_or_again(one: Equation, flops: float) -> Flops:
    """Of the five products of attention's backward pass one forms the scores again."""
    again = 1.0 if AGAIN in one.scope else 0.2 if one.backward and _part(one.scope).startswith("attention") else 0.0
    return Flops(flops * (1 - again), flops * again)


def _state_bytes(state: Any) -> float:
    """Of one device: the state read and written, and fp32 gradients of what has an optimizer written and read."""

    def size(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    trained = [learner for learner in state.learners.values() if learner.optimizer is not None]
    return float(sum(2 * size(learner) + 2 * size(learner.params) for learner in trained))
