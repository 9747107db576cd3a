"""What a run begins with: weights from elsewhere, all or some, and targets of teachers that are no learners of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from data import tokenizer
from data.loader import Corpus
from llama4_jax.axes import is_variable
from llama4_jax.config import ModelConfig, Rope
from llama4_jax.text import abstract
from training.checkpoint import Checkpoints, abstract_params, named_leaves
from training.config import RunConfig
from training.hf_import import load_hf
from training.model_folder import read_config
from training.record import CONFIG
from training.state import TrainState, create_state
from training.target_sources import TargetSource, open_source

SHARED = "shared:"
"""A learner's `init` of a model of another size."""


def initial_state(cfg: RunConfig, mesh: Mesh, say: Callable[[str], object] = print) -> TrainState:
    """Fresh optimizers; weights fresh from the seed, or from where a learner's `init` says: hf:DIR, run:DIR, or some of
    them from shared:DIR, about which `say` takes lines."""
    state = create_state(cfg, mesh)
    for name, learner in cfg.learners.items():
        if learner.init.startswith(SHARED):
            state.learners[name] = state.learners[name]._replace(
                params=_with_shared(cfg, name, mesh, state.learners[name].params, say)
            )
        elif learner.init:
            state.learners[name] = state.learners[name]._replace(params=nnx.State({}))  # freed before others are loaded
            state.learners[name] = state.learners[name]._replace(params=given_params(cfg, name, mesh)[0])
    return state


def given_params(cfg: RunConfig, name: str, mesh: Mesh) -> tuple[nnx.State, int]:
    """The weights that a learner's `init` names, on the mesh, and their step (0 where nothing says)."""
    learner = cfg.learners[name]
    kind, _, source = learner.init.partition(":")
    if kind == "hf":
        biased = learner.model.router_bias  # theirs has no bias, and ours begins at 0
        vision = learner.model.vision is not None  # a text model takes the text part of a whole one
        theirs = dataclasses.replace(read_config(source, vision), router_bias=biased)
        _check_architecture(name, learner.init, learner.model, theirs)
        like = abstract_params(cfg, name, mesh)
        places = jax.tree.map(lambda x: x.sharding, like)
        return load_hf(source, shardings=places, router_bias=biased, vision=vision), 0
    if kind == "run":
        with Checkpoints(source) as checkpoints:
            step = checkpoints.find()
            theirs = checkpoints.config(step)
            same = _counterpart(theirs, name, learner.init)
            _check_architecture(name, learner.init, learner.model, theirs.learners[same].model)
            like = abstract_params(theirs, same, mesh)
            return checkpoints.restore_tree(step, like, f"learners.{same}.params."), step
    raise ValueError(f"{name}'s init {learner.init} is a part of its weights: here it takes hf:DIR or run:DIR")


def _counterpart(theirs: RunConfig, name: str, init: str) -> str:
    """The learner of that name in a run, or its only one."""
    if name not in theirs.learners and len(theirs.learners) > 1:
        raise ValueError(f"{name}'s init {init} holds {', '.join(theirs.learners)}, none of them called {name!r}")
    return name if name in theirs.learners else next(iter(theirs.learners))


# --- From a model of another size


class Shared(NamedTuple):
    """What a model can take from another one: names of its weights, as checkpoints have them without their prefix."""

    taken: list[str]
    fresh: dict[str, str]  # and why


def shared_weights(ours: ModelConfig, theirs: ModelConfig) -> Shared:
    """Weights with the same path and shape in both, in layers of the same kind: embedding, head and norms where the
    width is one, attention where its heads are, experts where their number is, too; of stacked blocks all or none.

    Layers that differ in kind (local or global, dense or MoE) are different functions of the same shapes.
    """
    have, want = (named_leaves(nnx.split(abstract(model))[1]) for model in (theirs, ours))
    taken, fresh = [], {}
    for name, x in want.items():
        layer = re.match(r"blocks\.layers\.(\d+)\.", name)
        kinds = [model.pattern[int(layer[1])] if layer and int(layer[1]) < model.period else None
                 for model in (ours, theirs)]  # fmt: skip
        shape, there = list(x.get_value().shape), list(have[name].get_value().shape) if name in have else None
        if there is None:
            fresh[name] = "not there"
        elif kinds[0] != kinds[1]:
            fresh[name] = "a layer of another kind"
        elif shape != there:
            fresh[name] = f"{there} there, {shape} here"
        else:
            taken.append(name)
    return Shared(taken, fresh)


def _with_shared(
    cfg: RunConfig, name: str, mesh: Mesh, params: nnx.State, say: Callable[[str], object]
) -> nnx.State:  # fmt: skip
    """The fresh weights, with those of its `init` in their places."""
    learner, source = cfg.learners[name], cfg.learners[name].init.partition(":")[2]
    with Checkpoints(source) as checkpoints:
        step = checkpoints.find()
        theirs = checkpoints.config(step)
        same = _counterpart(theirs, name, learner.init)
        shared = shared_weights(learner.model, theirs.learners[same].model)
        named = named_leaves(abstract_params(cfg, name, mesh))
        like = {f"learners.{same}.params.{leaf}": named[leaf].get_value() for leaf in shared.taken}
        arrays = checkpoints.restore_some(step, like)
    say(f"{name} takes from {source}@{step}, {same}: {', '.join(shared.taken)}")
    say(f"{name} begins anew: {', '.join(f'{leaf} ({why})' for leaf, why in shared.fresh.items()) or 'nothing'}")
    leaves = [
        leaf.replace(arrays.get(f"learners.{same}.params.{path}", leaf.get_value()))
        for path, leaf in named_leaves(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_variable), leaves)


def _check_shares(cfg: RunConfig, name: str) -> None:
    init = cfg.learners[name].init
    with Checkpoints(init.partition(":")[2]) as checkpoints:
        theirs = checkpoints.config(checkpoints.find())
    same = _counterpart(theirs, name, init)
    shared = shared_weights(cfg.learners[name].model, theirs.learners[same].model)
    if not shared.taken:
        leaf, why = next(iter(shared.fresh.items()))
        raise ValueError(f"{name}'s init is {init}, but {same} there shares no weight with it: {leaf} is {why}")


# --- Before it begins


def stage_corpus(cfg: RunConfig, stage: RunConfig, corpus: Corpus, say: Callable[[str], object]) -> Corpus:
    """What a stage (`cfg.at`) reads, where `corpus` is what the run `cfg` was given to read: other documents, shares or
    room for images, by the same tokenizer."""
    same = (stage.data, stage.images) == (cfg.data, cfg.images)
    return corpus if same else corpus.of(stage.data, say, stage.images)


def check_init(cfg: RunConfig, name: str, tokens: str) -> None:
    """What a learner's `init` names is there, and if a tokenizer lies beside it, that one has the hash `tokens`."""
    init = cfg.learners[name].init
    folder = epath.Path(init.partition(":")[2])
    if init and not (folder / CONFIG).exists():
        hint = "" if init.startswith("hf:") else "; train it first"
        raise FileNotFoundError(f"{name}'s init is {init}, but {folder / CONFIG} is missing{hint}")
    source = tokenizer.find(folder) if init else None
    if source and tokenizer.load(source).hash != tokens:
        raise ValueError(f"{name}'s {init} has another tokenizer than this run: give --data.tokenizer {source}")
    if init.startswith(SHARED):
        _check_shares(cfg, name)


def _check_architecture(name: str, init: str, ours: ModelConfig, theirs: ModelConfig) -> None:
    for field in dataclasses.fields(ours):
        have, want = (getattr(_what_matters(model), field.name) for model in (theirs, ours))
        if have != want:
            raise ValueError(f"{init} has {field.name} = {have}, but {name}'s model has {want}")


def _what_matters(model: ModelConfig) -> ModelConfig:
    """The config without what does not change a trained model's output."""
    rope = model.rope if model.rope.factor != 1 else Rope(model.rope.theta)
    return dataclasses.replace(model, rope=rope, init_std=0.0, max_position=0)


def open_targets(cfg: RunConfig, tokenizer: str, say: Callable[[str], object] = print) -> dict[str, TargetSource]:
    """What finds the targets of a batch, by the teachers that are no learners of the run; raises as `open_source`."""
    chunk = next(iter(cfg.learners.values())).model.chunk  # that of the rows
    students = {learner.distillation.teacher: learner for learner in cfg.learners.values()}
    return {
        source: open_source(source, tokenizer, student.model.vocab_size, chunk, say)
        for source, student in students.items()
        if student.distillation.remote
    }
