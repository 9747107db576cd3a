"""What a run is: learners, data, mesh, and how long. Frozen dataclasses that import nothing heavy.

Every field is a command-line override (`--train.steps 100`, `--mesh.expert 8`); presets are functions in `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
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
    start: int = 0
    """Steps before all this: the rate rises, holds and falls over those from there on (in a run that --from began)."""
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
    vision: Literal["all", "projector", "none"] = "all"
    """What of a vision tower learns: all of it, the projector into the text model alone, or nothing."""

    def fall_start(self, steps: int) -> int:
        """The first step, from 0, of those over which the rate falls; `steps` where it never does."""
        return steps - round(self.decay * (steps - self.start))

    def __post_init__(self):
        _check(self.kind != "adafactor" or self.moment_dtype == "float32",
               "adafactor keeps no first moment: leave optimizer.moment_dtype at float32, or take adamw")  # fmt: skip
        _check(self.learning_rate > 0, f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        _check(0 <= self.decay <= 1, f"optimizer.decay is a share of the steps, 0 to 1, not {self.decay}")
        _check(self.warmup >= 0, f"optimizer.warmup must be at least 0, not {self.warmup}")
        _check(self.start >= 0, f"optimizer.start must be at least 0, not {self.start}")
        _check(0 <= self.final <= 1, f"optimizer.final is a share of the peak, 0 to 1, not {self.final}")
        _check(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optimizer.b1 and b2 lie in [0, 1), not {self.b1}, {self.b2}")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay must be at least 0, not {self.weight_decay}")
        _check(self.clip > 0, f"optimizer.clip must be positive, not {self.clip}")


@dataclass(frozen=True)
class Distillation:
    """What a student takes from its teacher: h CE + s t^2 D(teacher, student) on every token.

    The formulas of D are in `llama4_jax/kernels/vocab_loss/comparison.py`, those of h and s in `training/weighting.py`.
    """

    teacher: str = ""
    """The learner that teaches, one named before this one; or targets:DIR, what llama4 targets wrote; or
    stream:HOST:PORT, where llama4 targets serve runs; empty for none."""
    divergence: Literal["kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd"] = "kl"
    """D: KL(teacher || student), the other way about, against a mixture of both, or Jensen-Shannon."""
    skew: float = 0.1
    """Share of the mixture that is the first distribution's in skew_kl and skew_reverse_kl, the teacher's in jsd."""
    temperature: float = 1.0
    """t, of both distributions."""
    taid_start: float = 1.0
    """Below 1 the student learns from a blend of itself and its teacher, in the logits: this share of the teacher at
    first, 1 at the end (TAID)."""
    taid_rate: float = 5e-4
    """How fast the share rises beyond a straight line while D falls."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """The soft weight a over time: constant, from soft to soft_end, or soft times the learning rate's share of its own
    peak."""
    soft: float = 0.9
    """Peak of a."""
    soft_end: float = 0.0
    """Where linear and cosine end."""
    hard: Literal["rest", "one"] = "rest"
    """h: what the soft weight leaves of 1, or 1."""
    weighting: Literal["schedule", "confidence", "student_entropy", "disagreement", "gradient_norm", "competence"] = (
        "schedule"
    )
    """s: a itself; a by token, for a confident teacher, an unsure student or where they disagree; so that both
    gradients are of one size; or by domain, where the teacher predicts unseen tokens better than the student."""
    ema: float = 0.99
    """Decay, each step, of the running means that s is made of."""
    most: float = 4.0
    """Largest factor by which weighting raises s."""
    sharpness: float = 10.0
    """Of competence: how fast the gate opens, per nat."""
    margin: float = 0.0
    """Of competence: nats by which the teacher has to be better for half of a."""

    def __post_init__(self):
        for name in ("soft", "soft_end", "skew"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"distillation.{name} must lie between 0 and 1, not {value}")
        _check(self.divergence in ("kl", "reverse_kl") or 0 < self.skew < 1,
               f"distillation.skew must lie inside 0 and 1 for {self.divergence}, not {self.skew:g}")  # fmt: skip
        _check(0 <= self.taid_start <= 1, f"distillation.taid_start lies between 0 and 1, not {self.taid_start}")
        _check(self.temperature > 0, f"distillation.temperature must be positive, not {self.temperature}")
        _check(0 <= self.ema < 1, f"distillation.ema must lie in [0, 1), not {self.ema}")
        _check(self.most >= 1, f"distillation.most must be at least 1, not {self.most}")
        if self.remote:
            kind, _, place = self.teacher.partition(":")
            host, _, port = place.rpartition(":")
            _check(bool(place) and (kind == "targets" or (bool(host) and port.isdecimal())),
                   f"distillation.teacher must be a learner's name, targets:DIR or stream:HOST:PORT, not "
                   f"{self.teacher!r}")  # fmt: skip
            whole = self.divergence == "kl" and self.temperature == 1 and self.taid_start == 1
            _check(whole and self.weighting != "disagreement",
                   f"{self.teacher} gives a few of the teacher's probabilities, at temperature 1: enough for "
                   "divergence kl at temperature 1, without taid_start and weighting disagreement")  # fmt: skip

    @property
    def remote(self) -> bool:
        """Whether the teacher is no learner of this program."""
        return self.teacher.startswith(("targets:", "stream:"))


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
    """Where its weights come from: empty for random, hf:DIR for a Hugging Face folder, run:DIR for another run,
    shared:DIR for what a run's model of another size has in common with this one, the rest being random."""
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
    """Attention kernel; auto: splash on TPU, mosaic_gpu on GPU in bfloat16, blockwise elsewhere."""
    exchange: Literal["auto", "gather", "mirror", "heads"] = "auto"
    """What crosses mesh.context in global layers: keys and values, with the causal work as it lies (gather) or dealt
    out evenly (mirror); or heads in exchange for sequence (heads). auto: heads on GPU where they divide, else
    mirror."""
    grouped_matmul: Literal["auto", "blocks", "megablox", "triton", "reference"] = "auto"
    """The experts' matmul; auto: megablox on TPU, triton on GPU, blocks elsewhere."""
    quant: Literal["none", "fp8", "int8"] = "none"
    """Eight bits in the matmuls of attention's projections, of SwiGLU and of the experts, forward and backward: fp8 on
    H100, H200 and TPU7x, int8 on TPU v5e, v5p and v6e; CPUs emulate both. The embedding, attention's scores and values,
    the router and the head are not quantised. Needs the extra quant."""
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
        _check(not self.init or self.init.startswith(("hf:", "run:", "shared:")),
               f"init must be empty, hf:DIR, run:DIR or shared:DIR, not {self.init!r}")  # fmt: skip
        _check(self.optimizer is not None or not self.init.startswith("shared:"),
               f"init {self.init} leaves weights random, and this learner is frozen: take run:DIR")  # fmt: skip
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

    def suits(self, devices: int) -> bool:
        """Whether so many devices make such a mesh."""
        known = prod(size for size in vars(self).values() if size != -1)
        return devices % known == 0 if -1 in vars(self).values() else devices == known


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what is kept."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 8
    """Sequences of a step, over all devices."""
    seq_len: int = 1024
    """T, tokens of a sequence; a multiple of the model's chunk, or at most one chunk."""
    tiles: int = 0
    """Tiles of images that a sequence has room for; 0: text alone. A multiple of mesh.context."""
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
    checkpoint_keep_every: int = 0
    """Of older ones those of steps that are multiples of this are kept, too; 0 for none."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "tiles", "checkpoint_keep_every") else 1
            _check(value >= least, f"train.{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class SafetyConfig:
    """What a run does about bad steps, stuck hosts and hardware that computes wrongly (`docs/reliability.md`)."""

    bad_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite (each leaves the state as it was) after which the run
    goes back to a checkpoint and leaves out the data since."""
    spike: float = 10.0
    """It goes back, too, where a loss is above the median of the last 64 by so many robust deviations (1.4826 times the
    median absolute one, at least 2% of the median); 0: never."""
    rollbacks: int = 3
    """How often a run may go back; then it stops."""
    stuck_after: int = 1800
    """Seconds without a step, an evaluation batch or a restore after which a process shows its stacks and ends with
    status 70; 0: never. What compiles gets at least half an hour."""
    recheck_every: int = 0
    """Every so many steps one is computed twice, from the same state, and its bits are compared; 0: never. Holds two
    states at a time."""

    def __post_init__(self):
        _check(self.bad_steps >= 1, f"safety.bad_steps must be at least 1, not {self.bad_steps}")
        for name in ("spike", "rollbacks", "stuck_after", "recheck_every"):
            _check(getattr(self, name) >= 0, f"safety.{name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Schedule:
    """The learning rate from a stage on: warm-up, hold and fall over the steps to the next one that has a schedule."""

    peak: float = 0.1
    """Share of each learner's optimizer.learning_rate that is held."""
    warmup: int = 0
    """Steps of linear warm-up, from 0; none where the rate goes on from that of the stage before."""
    decay: float = 0.2
    """Last share of the steps, over which the rate falls linearly."""
    final: float = 0.1
    """Where it ends, as a share of this peak."""

    def __post_init__(self):
        _check(self.peak > 0, f"schedule.peak is a share of the learning rate, above 0, not {self.peak}")


@dataclass(frozen=True)
class Stage:
    """A later part of a run, with other rows, documents, devices or rates; what it leaves out is as in the run.

    Weights, the optimizer's state and the count of steps go on. It begins from the checkpoint of its first step's
    predecessor, whether the process is the same or another one, and has a stream of rows of its own if they differ.
    """

    after: int
    """Steps of the run before this stage."""
    batch: int = 0
    """Sequences of a step; 0: train.batch."""
    seq_len: int = 0
    """Tokens of a sequence; 0: train.seq_len."""
    tiles: int = 0
    """Room for tiles of images in a sequence; 0: train.tiles."""
    sources: dict[str, str] = field(default_factory=dict)
    """Other documents, read with the run's tokenizer; empty: data.sources."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by domain; empty: data.weights, or by size where sources names other documents."""
    mesh: MeshConfig | None = None
    """Other devices along the axes, or None."""
    microbatches: int = 0
    """Of every learner; 0: as it has."""
    remat: Literal["", "none", "attention", "layer", "block", "nested"] = ""
    """Of every learner; empty: as it has."""
    schedule: Schedule | None = None
    """The learning rate from here on; None: the one before goes on as if there were no boundary."""

    def __post_init__(self):
        _check(self.after >= 1, f"a stage's after must be at least 1, not {self.after}")
        for name in ("batch", "seq_len", "tiles", "microbatches"):
            _check(getattr(self, name) >= 0, f"a stage's {name} must be at least 0, not {getattr(self, name)}")


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
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    stages: tuple[Stage, ...] = ()
    """Its later parts, each from a step on, in their order; the first part is what the fields above say."""
    fork: str = ""
    """RUN@STEP, the checkpoint this run began from with weights, optimizer and step; written by --from."""
    out: str = ""
    """The run's folder; empty: runs/NAME."""

    def __post_init__(self):
        _check(not self.fork or self.fork.rpartition("@")[2].isdecimal(),
               f"fork must be empty or RUN@STEP, not {self.fork!r}")  # fmt: skip
        _check(bool(self.learners), "a run needs at least one learner")
        _check(any(learner.optimizer for learner in self.learners.values()), "a run needs a learner with an optimizer")
        seq_len = self.train.seq_len
        before: list[str] = []
        for name, learner in self.learners.items():
            teacher = learner.distillation.teacher
            listed = ", ".join(before) or "none"
            remote = learner.distillation.remote
            _check(not teacher or remote or teacher in before,
                   f"{name}'s teacher {teacher!r} is not among the learners before it: {listed}")  # fmt: skip
            _check(
                not teacher or learner.optimizer is not None, f"{name} is frozen, so it cannot learn from {teacher!r}"
            )
            _check(not teacher or remote or self.learners[teacher].model.vocab_size == learner.model.vocab_size,
                   f"{name} and its teacher {teacher} must share the vocabulary: model.vocab_size differs")  # fmt: skip
            before.append(name)
            start = learner.optimizer.start if learner.optimizer else 0
            steps = self.train.steps - start
            _check(steps > 0, f"{name}'s optimizer.start ({start}) must be less than train.steps ({start + steps})")
            falls = learner.optimizer is None or learner.optimizer.fall_start(self.train.steps) < self.train.steps
            _check(
                falls or not learner.model.router_bias,
                f"{name}'s router bias falls to 0 while its learning rate does, for which optimizer.decay leaves "
                f"none of {steps} steps: the nearest that leaves one is {1 / steps:.2g}",
            )
            chunk = learner.model.chunk
            _check(seq_len % chunk == 0 or seq_len <= chunk,
                   f"train.seq_len ({seq_len}) must be a multiple of {name}'s chunk ({chunk}), or at most one chunk: "
                   f"the nearest is {max(1, round(seq_len / chunk)) * chunk}")  # fmt: skip
        _check(len({learner.model.chunk for learner in self.learners.values()}) == 1,
               "learners of one run read the same packed rows, so they need the same model.chunk")  # fmt: skip
        self._check_images()
        self._check_stages()

    def _check_images(self) -> None:
        """Every learner of a run with images sees the same tiles."""
        if not self.train.tiles:
            return
        shapes: dict[str, object] = {}
        for name, learner in self.learners.items():
            vision = learner.model.vision
            _check(vision is not None, f"train.tiles is {self.train.tiles}, but {name}'s model has no vision tower: "
                   "set train.tiles to 0, or give the model one (llama4_jax.config.with_vision)")  # fmt: skip
            assert vision is not None
            shapes[name] = (vision.image_size, vision.tile_tokens)
            _check(not learner.distillation.remote,
                   f"{name}'s teacher {learner.distillation.teacher} gives targets by tokens alone, without images: "
                   "let it be a learner of this run")  # fmt: skip
        _check(len(set(shapes.values())) == 1,
               f"learners of one run see the same tiles, but (pixels a side, tokens) are {shapes}")  # fmt: skip

    @property
    def images(self) -> tuple[int, int, int] | None:
        """(tiles of a row, pixels of a tile's side, tokens of a tile), or None for text alone."""
        vision = next(iter(self.learners.values())).model.vision
        return (self.train.tiles, vision.image_size, vision.tile_tokens) if vision and self.train.tiles else None

    def _check_stages(self) -> None:
        """Stages follow one another, and each is a run that could be."""
        ends = [stage.after for stage in self.stages] + [self.train.steps]
        for stage, end in zip(self.stages, ends[1:], strict=True):
            what = "train.steps" if end == self.train.steps else "the next stage's after"
            _check(
                stage.after < end, f"a stage begins after step {stage.after}, which must be less than {what} ({end})"
            )
        for stage in (None, *self.stages) if self.stages else ():
            try:
                self.at(stage.after if stage else 0)
            except ValueError as error:
                raise ValueError(f"{f'after step {stage.after}' if stage else 'first stage'}: {error}") from error

    @property
    def folder(self) -> str:
        return self.out or f"runs/{self.name.replace(':', '-')}"

    def stage_end(self, done: int) -> int:
        """The last step of the stage that the step after `done` ones lies in."""
        return next((stage.after for stage in self.stages if stage.after > done), self.train.steps)

    def at(self, done: int) -> RunConfig:
        """What the step after `done` ones is a step of: a run without stages, of its stage's data, rows, mesh and rate.

        Its `train.steps` is where that learning rate's schedule ends, at or after the end of the stage. A run without
        stages is this itself.
        """
        if not self.stages:
            return self
        begun = [stage for stage in self.stages if stage.after <= done]
        stage = begun[-1] if begun else Stage(1)
        own = next((s for s in reversed(begun) if s.schedule), None)
        ends = (s.after for s in self.stages if s.schedule and s.after > done)
        train = replace(self.train, steps=next(ends, self.train.steps), batch=stage.batch or self.train.batch,
                        seq_len=stage.seq_len or self.train.seq_len, tiles=stage.tiles or self.train.tiles)  # fmt: skip
        weights = stage.weights or ({} if stage.sources else self.data.weights)
        data = replace(self.data, sources=stage.sources or self.data.sources, weights=weights)

        def learner_then(learner: Learner) -> Learner:
            optimizer = learner.optimizer
            if optimizer and own and (rate := own.schedule):
                optimizer = replace(optimizer, learning_rate=rate.peak * optimizer.learning_rate, warmup=rate.warmup,
                                    decay=rate.decay, final=rate.final, start=own.after)  # fmt: skip
            return replace(learner, optimizer=optimizer, microbatches=stage.microbatches or learner.microbatches,
                           remat=stage.remat or learner.remat)  # fmt: skip

        learners = {name: learner_then(learner) for name, learner in self.learners.items()}
        return replace(self, learners=learners, data=data, mesh=stage.mesh or self.mesh, train=train, stages=())
