"""What a run begins with: weights from elsewhere, and the targets of teachers that are no learners of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from data import tokenizer
from llama4_jax.config import ModelConfig, Rope
from training.checkpoint import abstract_params, load_config, restore_params
from training.config import RunConfig
from training.hf_import import load_hf
from training.model_folder import read_config
from training.state import TrainState, create_state
from training.target_sources import TargetSource, open_source

CONFIG = "config.json"
"""Of a run's folder, and of a Hugging Face folder."""


def initial_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """Fresh optimizers; weights fresh from the seed, or from where a learner's `init` says: hf:DIR or run:DIR."""
    state = create_state(cfg, mesh)
    for name, learner in cfg.learners.items():
        if learner.init:
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
        theirs = load_config(source).learners
        if name not in theirs and len(theirs) > 1:
            raise ValueError(f"{name}'s init {learner.init} holds {', '.join(theirs)}, none of them called {name!r}")
        same = name if name in theirs else None  # else it is their only one
        _check_architecture(name, learner.init, learner.model, theirs[same or next(iter(theirs))].model)
        weights = restore_params(source, same, mesh=mesh)
        return weights.params, weights.step
    raise AssertionError(learner.init)  # the configuration has checked it


def check_init(cfg: RunConfig, name: str, tokens: str) -> None:
    """What a learner's `init` names is there, and if a tokenizer lies beside it, that one has the hash `tokens`."""
    init = cfg.learners[name].init
    folder = epath.Path(init.partition(":")[2])
    if init and not (folder / CONFIG).exists():
        hint = "; train it first" if init.startswith("run:") else ""
        raise FileNotFoundError(f"{name}'s init is {init}, but {folder / CONFIG} is missing{hint}")
    source = tokenizer.find(folder) if init else None
    if source and tokenizer.load(source).hash != tokens:
        raise ValueError(f"{name}'s {init} has another tokenizer than this run: give --data.tokenizer {source}")


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
