"""A model for Python: the NNX module with its weights, and its tokenizer, from a run or a Hugging Face folder."""

from __future__ import annotations

from typing import NamedTuple

from etils import epath
from flax import nnx
from jax.sharding import Mesh

from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from llama4_jax.axes import Execution
from llama4_jax.text import Transformer, abstract
from training.checkpoint import restore_params
from training.config import RunConfig
from training.hf_import import load_hf
from training.mesh import check_divides, shardings
from training.model_folder import read_config, stop_ids
from training.weights import find_run


class Loaded(NamedTuple):
    """`nnx.split(model)` gives its graph and its parameters."""

    model: Transformer
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    """Ids that end a text."""


def load_model(place: str, learner: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """RUN, RUN@STEP, or a folder in Hugging Face's format, in fp32: on the first device, or as in training on `mesh`.

    `learner`: which of a run that has several; a folder has one. ValueError or FileNotFoundError says what is missing,
    or what of the model `mesh` does not divide.
    """
    if run := find_run(place):
        weights = restore_params(run[0], learner, run[1], mesh)
        cfg, params = weights.config.learners[weights.learner].model, weights.params
        tokens = run_tokenizer(run[0], weights.config)
        stops = (tokens.eos_id,)
    else:
        cfg = read_config(place)
        places = None
        if mesh is not None:
            check_divides(place, cfg, mesh)
            places = shardings(mesh, Execution().specs(nnx.split(abstract(cfg))[1]))
        params = load_hf(place, shardings=places)
        tokens = tokenizers.load(epath.Path(place))
        stops = stop_ids(place) or (tokens.eos_id,)
    model = nnx.merge(nnx.split(abstract(cfg))[0], params)
    return Loaded(model, tokens, stops)


def run_tokenizer(folder: epath.PathLike, cfg: RunConfig) -> Tokenizer:
    """The tokenizer that `llama4 train` kept in the run's folder, or that its configuration names; FileNotFoundError
    where there is neither."""
    kept = tokenizers.find(folder)
    if kept is None and not cfg.data.tokenizer:
        raise FileNotFoundError(f"no {tokenizers.MODEL_FILE} or {tokenizers.HF_FILE} in {folder}")
    return tokenizers.load(kept or cfg.data.tokenizer)
