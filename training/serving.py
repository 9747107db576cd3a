"""What a model needs to be served: weights in any form that is exported, key/value caches, prefill and decode.

Everything is by formula, of one device. With n devices, of which c share a context and t the heads, B sequences of S
tokens, and the house's letters (`llama4_jax/axes.py`):

    weights   the bytes of the exported folder's tensors / n, as an engine splits them
    caches    2 B K / t H (L_global ceil(S / c) + L_local min(C, S)) numbers of bf16 (`llama4_jax/generate.py`)
    working   what a layer holds of a piece of a prompt (half of `training/memory.py`'s for a backward pass, with its
              factor), or logits of B tokens, whichever is more; weights that an engine multiplies with in another
              form than they are stored in are not in here

    prefill   FLOPs of a forward pass over S tokens of B rows (`training/flops.py`, the head once a row) at the data
              sheet's bf16 peak of all devices
    decode    bytes of what a token of each row reads, the weights it visits (at most B A of the E experts of a layer)
              and the caches, at the data sheet's rate of HBM

Both times are the least that can be: at peak rates, and without what devices send to each other. Images are not
counted: their tokens are, as tokens.
"""

from __future__ import annotations

from typing import Any

from llama4_jax.axes import CONTEXT, TENSOR, Execution
from llama4_jax.config import ModelConfig
from llama4_jax.generate import cache_bytes
from training import chips, quantised
from training.config import MeshConfig
from training.export import Job, plan_jobs
from training.flops import forward
from training.memory import FACTORS, layer_activations
from training.mesh import make_mesh
from training.plan import ROOM

FORMS = ("bfloat16", "float32", *quantised.SCHEMES)
BF16 = 2


def serving(
    model: ModelConfig, topology: str, form: str, contexts: list[int], *, batch: int, piece: int, mesh: MeshConfig
) -> dict[str, Any]:
    """The plan as plain data. `form`: one of FORMS; `piece`: tokens of a prompt that are read at once, whole chunks.

    ValueError, in a line, for devices, a mesh or numbers that cannot be.
    """
    if form not in FORMS:
        raise ValueError(f"no form of weights {form!r}: there are {', '.join(FORMS)}")
    for name, number in (("batch", batch), ("piece", piece), *(("context", one) for one in contexts)):
        if number < 1:
            raise ValueError(f"serving: {name} must be at least 1, not {number}")
    made = make_mesh(mesh, chips.devices(topology))
    n, c, t = made.size, made.shape[CONTEXT], made.shape[TENSOR]
    if model.num_kv_heads % t:
        raise ValueError(f"mesh.tensor ({t}) must divide the {model.num_kv_heads} kv heads, whose caches it shares")
    chip = chips.CHIPS[topology.partition(":")[0]]
    hbm, rate, peak = (x / chip.devices for x in (chip.hbm, chip.hbm_rate, chip.bf16))
    jobs = plan_jobs(model, "float32" if form == "float32" else "bfloat16", quantised.SCHEMES.get(form))
    weights = sum(map(_bytes, jobs)) / n
    platform = "tpu" if chip.torus else "gpu"

    def need(context: int) -> dict[str, Any]:
        cache = cache_bytes(model, batch, context, BF16, c) / t
        rows = float(batch) * min(context, max(model.chunk, piece // model.chunk * model.chunk))
        of_layers = [layer_activations(model, Execution(), kind.moe, rows, BF16, t) for kind in model.pattern]
        working = max(FACTORS[platform]["activations"] * max(of_layers) / 2, 4.0 * batch * model.vocab_size / t)
        total = weights + cache + working
        flops = forward(model, context)
        once = batch * (context * (sum(flops.values()) - flops["head"]) + flops["head"])
        return dict(
            context=context, cache=cache, working=working, total=total, fits=total <= ROOM * hbm,
            prefill=once / (n * peak), decode=(_visited(model, jobs, batch) / n + cache) / rate,
        )  # fmt: skip

    return dict(
        topology=topology, devices=n, context_shards=c, tensor=t, form=form, batch=batch, hbm=hbm, room=ROOM,
        weights=weights, needs=[need(_whole(model, one)) for one in contexts], longest=_longest(model, need),
    )  # fmt: skip


def _bytes(job: Job) -> int:
    return sum(one.nbytes for one in job.outputs)


def _visited(model: ModelConfig, jobs: list[Job], batch: int) -> float:
    """Bytes of the weights that a token of each of `batch` rows is multiplied with; of the embedding it reads rows."""
    share = min(1.0, batch * model.experts_per_token / model.num_experts)
    of_expert = {job.tensor.name: ".experts." in job.tensor.name for job in jobs}
    rest = [job for job in jobs if not job.tensor.name.endswith("embed_tokens.weight")]
    rest = [job for job in rest if not job.tensor.name.startswith(("vision_model.", "multi_modal_projector."))]
    return sum(_bytes(job) * (share if of_expert[job.tensor.name] else 1.0) for job in rest)


def _whole(model: ModelConfig, context: int) -> int:
    """Rounded up to whole chunks, from one chunk on."""
    return context if context <= model.chunk else -(-context // model.chunk) * model.chunk


def _longest(model: ModelConfig, need: Any) -> int:
    """The longest context of whole chunks, of those the model knows, that fits; 0 if none does."""
    low, high = 0, max(1, model.max_position // model.chunk)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle * model.chunk)["fits"] else (low, middle - 1)
    return low * model.chunk
