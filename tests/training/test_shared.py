"""A learner that begins with what a model of another size has in common with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from training import checkpoint
from training.checkpoint import Checkpoints, named_leaves
from training.config import MeshConfig
from training.loop import train
from training.mesh import make_mesh
from training.start import initial_state, shared_weights


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


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, expert=2)], ids=["one", "4"])
def test_a_student_begins_with_them(make_run, corpus, mesh):
    """Those that are shared to the bit, all others as from the seed; then it trains."""
    big = make_run("big", steps=2, checkpoint_every=2, eval_every=2)
    train(big, corpus, quiet)
    cfg = replace(another(make_run("small", steps=2), f"shared:{big.folder}", num_experts=8), mesh=mesh)
    if mesh.expert > 1 and jax.device_count() < 4:
        pytest.skip("needs four devices")
    lines: list[str] = []
    place = make_mesh(replace(mesh, fsdp=mesh.fsdp if mesh.expert > 1 else jax.device_count()))
    got = leaves(initial_state(cfg, place, lines.append), "student")
    fresh = leaves(initial_state(another(cfg, num_experts=8), place), "student")
    with Checkpoints(big.folder) as checkpoints:
        like = checkpoint.abstract_params(big, "scout")
        given = {
            path: np.asarray(x.get_value())
            for path, x in named_leaves(checkpoints.restore_tree(2, like, "learners.scout.params.")).items()
        }
    taken = [path for path in got if np.array_equal(got[path], given[path])]
    assert taken == shared_weights(cfg.learners["student"].model, big.learners["scout"].model).taken
    assert lines[0] == f"student takes from {big.folder}@2, scout: {', '.join(taken)}"
    assert (
        lines[1].startswith("student begins anew: blocks.layers.1.") and "[2, 32, 4] there, [2, 32, 8] here" in lines[1]
    )
    for path in set(got) - set(taken):
        assert np.array_equal(got[path], fresh[path]), path
    assert any(not np.array_equal(given[path], fresh[path]) for path in taken)


def test_what_shares_nothing_is_refused(make_run, corpus, tmp_path):
    big = make_run("big", steps=1)
    train(big, corpus, quiet)
    init = f"shared:{big.folder}"
    cfg = another(make_run("none"), init, embed_dim=16)
    with pytest.raises(
        ValueError, match=r"student's init is shared:.*, but scout there shares no weight with it: .* is "
    ):
        train(cfg, corpus, quiet)
    assert not Path(cfg.folder).exists()
    with pytest.raises(ValueError, match="init shared:x leaves weights random, and this learner is frozen"):
        replace(cfg.learners["student"], init="shared:x", optimizer=None)
    with pytest.raises(FileNotFoundError, match="missing; train it first"):
        train(another(make_run("none"), f"shared:{tmp_path / 'nowhere'}"), corpus, quiet)
