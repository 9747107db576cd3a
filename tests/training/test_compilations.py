"""A run compiles nothing after its first step, holds one state, and never makes the devices wait for the host."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from training import loop
from training.bench import synthetic_batches
from training.mesh import make_mesh
from training.state import create_state
from training.step import make_train_step

COMPILED = "/jax/core/compile/backend_compile_duration"  # also where a program comes out of the cache on disk
TRACED = "/jax/core/compile/jaxpr_trace_duration"


class Counted:
    """How often jax traced and compiled."""

    def __init__(self):
        self.compiled = self.traced = 0

    def __call__(self, event: str, *_: object, **__: object) -> None:
        self.compiled += event == COMPILED
        self.traced += event == TRACED


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    count = Counted()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_the_counter_counts():
    f = jax.jit(lambda x: x * 3 + 1)
    ones, more = jnp.ones(3), jnp.ones(5)
    with counting() as count:
        f(ones)
        assert (count.compiled, count.traced) == (1, 1)
        f(ones)
        assert (count.compiled, count.traced) == (1, 1)
        f(more)
        assert (count.compiled, count.traced) == (2, 2)
    f(jnp.ones(7))
    assert count.compiled == 2


def spied(corpus, before: Callable[[int], None]):
    """`corpus.train`, whose stream calls `before(step)` when the batch of a step is asked for."""
    make = corpus.train

    def train(*args):
        stream = make(*args)

        class Stream:
            asked = 0
            get_state, set_state, close = stream.get_state, stream.set_state, stream.close

            def __next__(self):
                self.asked += 1
                before(self.asked)
                return next(stream)

        return Stream()

    return train


def test_nothing_is_compiled_after_the_first_step(make_run, corpus, monkeypatch):
    """Steps 2 to 4 of 8, before the first evaluation, and the steps after it; evaluation compiles once, too."""
    seen = {}
    with counting() as count:
        note = spied(corpus, lambda step: seen.update({step: (count.compiled, count.traced)}))
        monkeypatch.setattr(corpus, "train", note)
        monkeypatch.setattr(loop.Checkpoints, "save", lambda *_: None)  # the first one slices what all devices hold
        loop.train(make_run(checkpoint_every=8), corpus, lambda _: None)
        end = (count.compiled, count.traced)
    assert seen[1] < seen[2]  # the first step was compiled after its batch had come
    assert seen[2] == seen[3] == seen[4]
    assert seen[4] < seen[5] == seen[6] == seen[7] == seen[8] == end  # the evaluation after step 4, and no other


def test_the_old_state_is_given_up(make_run):
    """Every array of the state is updated in place, and none of the batch's is taken."""
    cfg = make_run()
    mesh = make_mesh(cfg.mesh)
    batch = loop.put_local(synthetic_batches(cfg, count=1)[0], mesh)
    old = create_state(cfg, mesh)
    lowered = make_train_step(cfg, mesh, domains=1).lower(old, batch)
    train_step = lowered.compile()
    size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(old))
    assert train_step.memory_analysis().alias_size_in_bytes == size
    new, _ = train_step(old, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, batch)))


class Sealed:
    """What a step returned, of which nothing can be read."""

    def __init__(self, step: int, content):
        self.step, self.content = step, content


def test_the_host_waits_only_for_the_step_before(make_run, corpus, monkeypatch):
    """Between two steps nothing is read but, once the second is dispatched, the metrics of the first."""
    events: list[tuple[str, int]] = []
    make, get = loop.make_train_step, jax.device_get

    def make_sealed(*args):
        train_step, count = make(*args), itertools.count(1)

        def sealed(state, batch, targets):
            step = next(count)
            events.append(("dispatched", step))
            return [Sealed(step, x) for x in train_step(state.content if step > 1 else state, batch, targets)]

        return sealed

    def get_sealed(x):
        events.append(("fetched", x.step))
        return get(x.content)

    monkeypatch.setattr(loop, "make_train_step", make_sealed)
    monkeypatch.setattr(jax, "device_get", get_sealed)
    # After the last step both may read what they like.
    monkeypatch.setattr(loop, "HeldOut", lambda *_: lambda *_: {})
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *_: None)
    loop.train(make_run(steps=6, eval_every=100, checkpoint_every=100), corpus, lambda _: None)
    expected = [("dispatched", 1)]
    for step in range(2, 7):
        expected += [("dispatched", step), ("fetched", step - 1)]
    assert events == [*expected, ("fetched", 6)]


def test_another_shape_would_be_noticed(make_run):
    """The step itself, given a batch of another shape, is what the counter counts."""
    cfg = make_run()
    mesh = make_mesh(cfg.mesh)
    other = replace(cfg, train=replace(cfg.train, batch=16))
    state = create_state(cfg, mesh)
    first, second = (loop.put_local(synthetic_batches(c, count=1)[0], mesh) for c in (cfg, other))
    train_step = make_train_step(cfg, mesh, domains=1)
    state, _ = train_step(state, first)
    with counting() as count:
        state, _ = train_step(state, first)
        assert count.compiled == 0
        train_step(state, second)
    assert count.compiled == 1
