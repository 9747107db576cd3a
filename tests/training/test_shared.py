"""A learner that begins with what a model of another size has in common with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from training import checkpoint
from training.checkpoint import Checkpoints, named_leaves
from training.config import MeshConfig
from training.loop import train
from training.mesh import make_mesh
from training.record import run_record, write_config
from training.start import given_params, initial_state, shared_weights
from training.state import create_state


def quiet(_: object) -> None:
    pass


def another(cfg, init: str = "", **changes):
    learner = cfg.learners["scout"]
    return replace(cfg, learners={"student": replace(learner, model=replace(learner.model, **changes), init=init)})


def leaves(state, name: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(x.get_value()) for path, x in named_leaves(state.learners[name].params).items()}


def test_what_two_sizes_share(make_run):
    model = make_run().learners["scout"].model
    every = [*named_leaves(checkpoint.abstract_params(make_run(), "scout"))]
    assert shared_weights(model, model) == (every, {})
    few = shared_weights(replace(model, num_experts=2), model)
    assert few.taken and set(few.taken) | set(few.fresh) == set(every)
    assert all("experts" in name or "router" in name for name in few.fresh)
    why = next(why for name, why in few.fresh.items() if "router" in name)
    assert why == "[2, 32, 4] there, [2, 32, 2] here"
    longer = shared_weights(replace(model, num_layers=8), model)
    assert longer.taken == [name for name in every if not name.startswith("blocks.")]
    other = shared_weights(replace(model, moe_every=1), model)  # one of two layers is of another kind
    assert set(other.fresh.values()) == {"a layer of another kind", "not there"}
    assert any(name.startswith("blocks.layers.1.") for name in other.taken)
    assert not any(name.startswith("blocks.layers.0.") for name in other.taken)


@pytest.fixture
def big(make_run, corpus):
    """A run's folder with a checkpoint, without the training."""
    cfg, folder = make_run("big"), epath.Path(make_run("big").folder)
    write_config(folder, cfg)
    corpus.tokenizer.save(folder)
    with Checkpoints(folder, keep=1) as checkpoints:
        state = create_state(replace(cfg, train=replace(cfg.train, seed=7)), make_mesh(cfg.mesh, jax.devices()[:1]))
        checkpoints.save(2, state, {}, run_record(cfg, corpus.tokenizer.hash))
    return cfg


def test_a_student_begins_with_them(make_run, big):
    """Those that are shared to the bit, all others as from the seed."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), jax.devices()[:4])
    cfg = replace(another(make_run("small"), f"shared:{big.folder}", num_experts=8), mesh=MeshConfig(fsdp=2, expert=2))
    lines: list[str] = []
    got = leaves(initial_state(cfg, mesh, lines.append), "student")
    plain = replace(cfg, learners={"student": replace(cfg.learners["student"], init="")})
    fresh = leaves(initial_state(plain, mesh), "student")
    with Checkpoints(big.folder) as checkpoints:
        like = checkpoint.abstract_params(big, "scout")
        tree = checkpoints.restore_tree(2, like, "learners.scout.params.")
    given = {path: np.asarray(x.get_value()) for path, x in named_leaves(tree).items()}
    taken = shared_weights(cfg.learners["student"].model, big.learners["scout"].model).taken
    for path, x in got.items():
        assert np.array_equal(x, given[path] if path in taken else fresh[path]), path
    assert any(not np.array_equal(given[path], fresh[path]) for path in taken)
    assert lines[0] == f"student takes from {big.folder}@2, scout: {', '.join(taken)}"
    assert lines[1].startswith("student begins anew: blocks.layers.")
    assert "[2, 32, 4] there, [2, 32, 8] here" in lines[1]


@pytest.mark.slow
def test_a_run_from_shared_weights_trains_and_goes_on(make_run, corpus, big):
    cfg = another(make_run("small", steps=4), f"shared:{big.folder}", num_experts=8)
    lines: list[str] = []
    train(cfg, corpus, lines.append)
    assert sum("student takes from" in line for line in lines) == 1
    longer = replace(cfg, train=replace(cfg.train, steps=6))
    assert train(longer, corpus, quiet)["step"] == 6


def test_a_part_is_no_teacher(make_run, big):
    cfg = another(make_run("small"), f"shared:{big.folder}", num_experts=8)
    with pytest.raises(ValueError, match=r"student's init shared:.* is a part of its weights: here it takes hf:DIR"):
        given_params(cfg, "student", make_mesh(cfg.mesh, jax.devices()[:1]))


def test_what_shares_nothing_is_refused(make_run, corpus, big, tmp_path):
    cfg = another(make_run("none"), f"shared:{big.folder}", embed_dim=16)
    with pytest.raises(ValueError, match=r"student's init is shared:.*, but scout there shares no weight with it: "):
        train(cfg, corpus, quiet)
    assert not Path(cfg.folder).exists()
    with pytest.raises(ValueError, match="init shared:x leaves weights random, and this learner is frozen"):
        replace(cfg.learners["student"], init="shared:x", optimizer=None)
    with pytest.raises(FileNotFoundError, match="missing; train it first"):
        train(another(make_run("none"), f"shared:{tmp_path / 'nowhere'}"), corpus, quiet)
