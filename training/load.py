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
from training.hf_import import load_hf
from training.mesh import shardings
from training.model_folder import read_config, stop_ids
from training.weights import RunWeights, open_weights


class Loaded(NamedTuple):
    """`nnx.split(model)` gives its graph and its parameters."""

    model: Transformer
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    """Ids that end a text."""


def load_model(place: str, learner: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """RUN, RUN@STEP, or a folder in Hugging Face's format, in fp32: on the first device, or as in training on `mesh`.

    ValueError or FileNotFoundError says what is missing.
    """
    weights = open_weights(place, learner)
    if isinstance(weights, RunWeights):
        arrays = weights.arrays
        params = restore_params(arrays.folder, arrays.learner, arrays.step, mesh).params
        tokens = tokenizers.load(tokenizers.find(arrays.folder) or arrays.config.data.tokenizer)
        stops = (tokens.eos_id,)
    else:
        structure = nnx.split(abstract(read_config(place)))[1]
        places = None if mesh is None else shardings(mesh, Execution().specs(structure))
        params = load_hf(place, shardings=places)
        tokens = tokenizers.load(epath.Path(place))
        stops = stop_ids(place) or (tokens.eos_id,)
    model = nnx.merge(nnx.split(abstract(weights.cfg))[0], params)
    return Loaded(model, tokens, stops)
