"""What a run is: learners, data, mesh, and how long. Frozen dataclasses that import nothing heavy.

Every field is a command-line override (`--train.steps 100`, `--mesh.expert 8`); presets are functions in `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data.config import DataConfig
from llama4_jax.config import ModelConfig


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Adafactor or Muon under a warmup-stable-decay schedule."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    """The rule: adafactor keeps rows' and columns' second moments and no first one; muon keeps one moment of hidden
    matrices, orthogonalised for the update, and leaves embeddings, router and scales to adamw."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment of adamw and muon; second moments are fp32."""
    learning_rate: float = 3e-4
    """Peak, held between warm-up and decay."""
    warmup: int = 100
    """Steps of linear warm-up; the first has peak/warmup."""
    decay: float = 0.2
    """Last share of the steps, over which the rate falls linearly."""
    final: float = 0.1
    """Where it ends, as a share of the peak."""
    b1: float = 0.9
    """Decay of the mean of gradients; muon's momentum, usually 0.95."""
    b2: float = 0.95
    """Decay of the mean of their squares; adafactor's rises to it as 1 - t^-0.8 with step t."""
    eps: float = 1e-8
    """Added to the root of the second moment; adafactor adds its square to the squares."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; on weights with two logical axes or more (not on norm scales)."""
    clip: float = 1.0
    """Largest global gradient norm."""

    def fall_start(self, steps: int) -> int:
        """The first step, from 0, of those over which the rate falls; `steps` where it never does."""
        return steps - round(self.decay * steps)

    def __post_init__(self):
        _check(self.kind != "adafactor" or self.moment_dtype == "float32",
               "adafactor keeps no first moment: leave optimizer.moment_dtype at float32, or take adamw")  # fmt: skip
        _check(self.learning_rate > 0, f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        _check(0 <= self.decay <= 1, f"optimizer.decay is a share of the steps, 0 to 1, not {self.decay}")
        _check(self.warmup >= 0, f"optimizer.warmup must be at least 0, not {self.warmup}")
        _check(0 <= self.final <= 1, f"optimizer.final is a share of the peak, 0 to 1, not {self.final}")
        _check(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optimizer.b1 and b2 lie in [0, 1), not {self.b1}, {self.b2}")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay must be at least 0, not {self.weight_decay}")
        _check(self.clip > 0, f"optimizer.clip must be positive, not {self.clip}")


@dataclass(frozen=True)
class Distillation:
    """What a student takes from its teacher: h CE + s t^2 KL(teacher || student) on every token, h = 1 - s."""

    teacher: str = ""
    """The learner that teaches, one named before this one; empty for none."""
    weighting: Literal["constant", "wsd"] = "wsd"
    """Of s over time: constant, or the peak times the learning rate's share of its own peak."""
    soft: float = 0.9
    """Peak of s, the soft targets' weight."""
    temperature: float = 1.0
    """t, of both distributions."""

    def __post_init__(self):
        _check(0 <= self.soft <= 1, f"distillation.soft must lie between 0 and 1, not {self.soft}")
        _check(self.temperature > 0, f"distillation.temperature must be positive, not {self.temperature}")


@dataclass(frozen=True)
class Learner:
    """One model of a run and how it is trained."""

    model: ModelConfig
    """Its architecture."""
    optimizer: OptimizerConfig | None = field(default_factory=OptimizerConfig)
    """How it learns; None for a frozen teacher."""
    distillation: Distillation = field(default_factory=Distillation)
    """Whom it learns from, beside the labels."""
    init: str = ""
    """Where its weights come from: empty for random, hf:DIR for a Hugging Face folder, run:DIR for another run."""
    microbatches: int = 1
    """Parts of a batch that each device runs one after the other, summing gradients (router's losses are of a part)."""
    router_balance: float = 0.01
    """Weight of the router's balance loss."""
    router_z: float = 0.001
    """Weight of the router's z-loss."""
    router_bias_speed: float = 0.001
    """u, by which a step moves the biases of model.router_bias towards even loads; while the learning rate falls, they
    fall to 0 instead."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and of the weights as used; master weights are fp32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over the mesh; bfloat16 halves that traffic."""
    attention: Literal["auto", "blockwise", "splash", "cudnn", "mosaic_gpu", "reference"] = "auto"
    """Attention kernel; auto: splash on TPU, mosaic_gpu on GPU, blockwise elsewhere."""
    exchange: Literal["auto", "gather", "mirror", "heads"] = "auto"
    """What crosses mesh.context in global layers: keys and values, with the causal work as it lies (gather) or dealt
    out evenly (mirror); or heads in exchange for sequence (heads). auto: heads on GPU where they divide, else
    mirror."""
    grouped_matmul: Literal["auto", "blocks", "megablox", "triton", "reference"] = "auto"
    """The experts' matmul; auto: megablox on TPU, triton on GPU, blocks elsewhere."""
    quant: Literal["none", "fp8", "int8"] = "none"
    """Eight bits in the matmuls of attention's projections, of SwiGLU and of the experts, forward and backward: fp8 on
    H100 and TPU7x, int8 on TPU v5e, v5p and v6e; CPUs emulate both. The embedding, attention's scores and values, the
    router and the head are not quantised. Needs the extra quant."""
    dispatch: Literal["fsdp", "all_to_all", "ragged_all_to_all"] = "fsdp"
    """How tokens and experts meet: the experts' weights are gathered and no token is dropped (fsdp), or tokens travel
    over mesh.expert, in buffers of `capacity`."""
    capacity: float = 1.25
    """Room for routed tokens, times what a balanced router needs, under the two all_to_all dispatches."""
    remat: Literal["none", "attention", "layer", "block", "nested"] = "block"
    """What the backward pass recomputes: nothing, each layer without its attention, each layer, each period of layers,
    or the last two (least memory)."""
    offload: bool = False
    """Keep what layers, or periods of them, are recomputed from in the host's memory."""

    def __post_init__(self):
        _check(self.microbatches >= 1, f"microbatches must be at least 1, not {self.microbatches}")
        _check(self.router_bias_speed >= 0, f"router_bias_speed must be at least 0, not {self.router_bias_speed}")
        _check(not self.init or self.init.startswith(("hf:", "run:")),
               f"init must be empty, hf:DIR or run:DIR, not {self.init!r}")  # fmt: skip
        _check(not self.offload or self.remat != "none",
               "offload moves what is recomputed from, which remat none does not: use remat attention")  # fmt: skip


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what is left.

    On several TPU slices `replica` is a multiple of their number: it alone crosses the network between slices, which
    carries one sum of each gradient's shard a step; all other axes lie within a slice.
    """

    replica: int = 1
    """Copies of everything; with several TPU slices a multiple of their number."""
    fsdp: int = -1
    """Data parallel with sharded weights."""
    expert: int = 1
    """Data parallel; the experts are stored over it, and gathered for use like all weights."""
    context: int = 1
    """The sequence is split over it."""
    tensor: int = 1
    """Heads, ffn and vocabulary are split over it."""

    def __post_init__(self):
        sizes = vars(self)
        _check(all(s == -1 or s >= 1 for s in sizes.values()), f"mesh sizes must be at least 1, or -1: {sizes}")
        _check(sum(s == -1 for s in sizes.values()) <= 1, f"only one mesh axis may be -1: {sizes}")


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what is kept."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 8
    """Sequences of a step, over all devices."""
    seq_len: int = 1024
    """T, tokens of a sequence; a multiple of the model's chunk, or at most one chunk."""
    seed: int = 0
    """Of weights, data order, and anything random."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 100
    """Steps between evaluations on held-out documents; also at the end."""
    eval_batches: int = 8
    """Batches of an evaluation, always the same ones."""
    checkpoint_every: int = 100
    """Steps between checkpoints; also at the end."""
    checkpoint_keep: int = 2
    """Newest checkpoints to keep."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "seed" else 1
            _check(value >= least, f"train.{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class RunConfig:
    """A run: who learns, from what, on which mesh, for how long."""

    name: str
    """The preset it came from, and the default folder's name."""
    learners: dict[str, Learner]
    """By name, teachers before the students they teach."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = ""
    """The run's folder; empty: runs/NAME."""

    def __post_init__(self):
        _check(bool(self.learners), "a run needs at least one learner")
        _check(any(learner.optimizer for learner in self.learners.values()), "a run needs a learner with an optimizer")
        seq_len = self.train.seq_len
        before: list[str] = []
        for name, learner in self.learners.items():
            teacher = learner.distillation.teacher
            listed = ", ".join(before) or "none"
            _check(not teacher or teacher in before,
                   f"{name}'s teacher {teacher!r} is not among the learners before it: {listed}")  # fmt: skip
            _check(
                not teacher or learner.optimizer is not None, f"{name} is frozen, so it cannot learn from {teacher!r}"
            )
            _check(not teacher or self.learners[teacher].model.vocab_size == learner.model.vocab_size,
                   f"{name} and its teacher {teacher} must share the vocabulary: model.vocab_size differs")  # fmt: skip
            before.append(name)
            falls = learner.optimizer is None or learner.optimizer.fall_start(self.train.steps) < self.train.steps
            _check(
                falls or not learner.model.router_bias,
                f"{name}'s router bias falls to 0 while its learning rate does, for which optimizer.decay leaves "
                f"none of {self.train.steps} steps: the nearest that leaves one is {1 / self.train.steps:.2g}",
            )
            chunk = learner.model.chunk
            _check(seq_len % chunk == 0 or seq_len <= chunk,
                   f"train.seq_len ({seq_len}) must be a multiple of {name}'s chunk ({chunk}), or at most one chunk: "
                   f"the nearest is {max(1, round(seq_len / chunk)) * chunk}")  # fmt: skip
        _check(len({learner.model.chunk for learner in self.learners.values()}) == 1,
               "learners of one run read the same packed rows, so they need the same model.chunk")  # fmt: skip

    @property
    def folder(self) -> str:
        return self.out or f"runs/{self.name.replace(':', '-')}"
