"""FLOPs by hand, and that the program of each of the family's sizes does as many, and which of them again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama4_jax.config import MODELS, ModelConfig, behemoth, maverick, scout
from training.chips import devices
from training.config import Distillation, Learner, MeshConfig, RunConfig, TrainConfig
from training.flops import active_matmul_parameters, forward, of_step, per_token, step_per_token
from training.mesh import make_mesh
from training.program import Program, count

LONG = 262_144


def test_flops_of_scout():
    """Written out by hand from the model card's shape."""
    attention = 5120 * 40 * 128 + 2 * 5120 * 8 * 128 + 40 * 128 * 5120
    ffn = 2 * 3 * 5120 * 8192 + 5120 * 16  # shared and one routed expert, router
    active = 48 * (attention + ffn) + 5120 * 202_048
    assert active == active_matmul_parameters(scout()) == 16_137_912_320  # and 1.03B of embedding: the card's 17B
    # 4 N H flops a (query, key) pair forward, three times that with the backward pass, of (S + 1) / 2 keys.
    assert per_token(scout(), 8192) == 6 * active + 48 * 6 * 40 * 128 * 8193 == 108_908_544_000
    assert per_token(scout(), 262_144) == 6 * active + 6 * 40 * 128 * (36 * 8193 + 12 * 262_145)


def test_flops_of_maverick():
    """Every other layer dense."""
    attention, router = 62_914_560, 5120 * 128
    active = 48 * attention + 24 * (3 * 5120 * 16_384) + 24 * (2 * 3 * 5120 * 8192 + router) + 5120 * 202_048
    assert active_matmul_parameters(maverick()) == active


def test_flops_of_teachers():
    model = replace(scout(), num_layers=4, vocab_size=1000)
    teacher = Learner(model)
    student = Learner(model, distillation=Distillation("teacher"))
    train = TrainConfig(seq_len=1024)
    one = per_token(model, 1024)
    head = 2 * 5120 * 1000  # of one pass through the unembedding
    both = step_per_token(RunConfig("x", {"teacher": teacher, "scout": student}, train=train))
    assert both == 2 * one + head
    teacher = replace(teacher, optimizer=None)
    frozen = step_per_token(RunConfig("x", {"teacher": teacher, "scout": student}, train=train))
    assert frozen == pytest.approx((one - 3 * head) / 3 + one + head)


def test_six_flops_a_weight_and_attention_beside_it():
    """README's active parameters but for the embedding, 6 FLOPs each; the rest is scores and values."""
    for model, active in ((scout(), 17_172_894_720), (maverick(), 17_184_691_200), (behemoth(), 287_161_729_024)):
        vectors = model.embed_dim * (2 * model.num_layers + 1)  # scales of norms
        weights = active - model.vocab_size * model.embed_dim - vectors
        attention = 3 * sum(flops for part, flops in forward(model, 8192).items() if part.startswith("attention"))
        assert per_token(model, 8192) == 6 * weights + attention


def counted(model: ModelConfig, seq_len: int, mesh: MeshConfig | None = None, **how) -> tuple[RunConfig, Program]:
    """A step of one row a device or one over all."""
    mesh = mesh or (MeshConfig(context=32) if seq_len == LONG else MeshConfig())
    batch = 128 // (32 if seq_len == LONG else 1)
    train = TrainConfig(batch=batch, seq_len=seq_len)
    cfg = RunConfig("counted", {"model": Learner(model, **how)}, mesh=mesh, train=train)
    return cfg, count(cfg, make_mesh(mesh, devices("v5p:4x4x8")))


def by_hand(cfg: RunConfig, program: Program) -> dict:
    """Of one device and a step, without parts that a model has not."""
    tokens = program.tokens / program.devices
    return {of: tokens * flops for of, flops in of_step(cfg).items() if flops}


@pytest.mark.parametrize("seq_len", [8192, LONG])
@pytest.mark.parametrize("name", ["scout", "maverick", "behemoth"])
def test_the_program_does_what_the_formula_says(name, seq_len):
    cfg, program = counted(MODELS[name](), seq_len, remat="none")
    assert {of: flops.once for of, flops in program.flops.items()} == pytest.approx(by_hand(cfg, program), rel=1e-9)
    assert program.total.once == pytest.approx(program.model_flops / program.devices, rel=1e-9)
    scores = sum(flops.all for (_, part), flops in program.flops.items() if part.startswith("attention"))
    assert program.total.again == pytest.approx(scores / 7)  # two products forward, five backward, one of them again


@pytest.mark.parametrize(
    "name, seq_len",
    [
        ("maverick", LONG),
        pytest.param("scout", LONG, marks=pytest.mark.slow),
        pytest.param("scout", 8192, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("remat", ["attention", "layer", "block", "nested"])
def test_what_each_policy_computes_again(name, seq_len, remat):
    """A part that is computed again stops before its last product, back into the residual stream: a third of SwiGLU."""
    model = MODELS[name]()
    _, program = counted(model, seq_len, remat=remat)
    once, again = (
        {part: getattr(flops, what) for (_, part), flops in program.flops.items()} for what in ("once", "again")
    )
    layers = 1 - 1 / 3  # all but the last product of each layer, or of the last layer of each period:
    period = 1 - 1 / 3 / sum(kind.moe for kind in model.pattern)
    each = remat != "block"
    for part, flops in once.items():
        whole = dict(attention=0, layer=0, block=1, nested=1)[remat]
        if remat == "nested" and name != "scout":  # Scout's period is a loop, of which none of the layers is left out;
            whole = without_last(model, part)  # here the last one is not run to find the others' inputs
        passes = whole + each
        if part in ("experts", "shared_expert"):
            passes = whole * (period if remat == "block" else 1) + each * layers
        elif part == "dense":
            passes = whole + each * layers
        elif part.startswith("attention"):
            passes = (0 if remat == "attention" else passes) + 0.5  # of a forward pass: the scores, backward
        elif part == "head":
            passes = 0
        assert again[part] == pytest.approx(passes * flops / 3, rel=1e-9), part


def without_last(model: ModelConfig, part: str) -> float:
    """The share of a part's work that lies in all but the last layer of a period."""
    of = dict(attention_local="local", attention_global="global", dense="dense", router="moe", experts="moe",
              shared_expert="moe").get(part)  # fmt: skip
    has = [of in (None, "local" if k.local else "global", "moe" if k.moe else "dense") for k in model.pattern]
    return sum(has[:-1]) / max(sum(has), 1)


def test_capacity_buffers_are_multiplied_whole():
    cfg, program = counted(scout(), 8192, MeshConfig(expert=16), remat="none", dispatch="all_to_all", capacity=1.25)
    want = by_hand(cfg, program) | {("model", "experts"): 1.25 * by_hand(cfg, program)["model", "experts"]}
    assert {of: flops.once for of, flops in program.flops.items()} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("dispatch", ["fsdp", "ragged_all_to_all"])
def test_rows_that_exist_are_multiplied_once(dispatch):
    mesh = MeshConfig(expert=8, tensor=2)
    cfg, program = counted(maverick(), 8192, mesh, remat="none", dispatch=dispatch, microbatches=2)
    want = by_hand(cfg, program)
    want["model", "router"] *= 2  # on each device of the tensor axis
    assert {of: flops.once for of, flops in program.flops.items()} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("teacher_learns", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_codistillation(teacher_learns):
    """A frozen teacher's forward pass, and a product with its head for each student."""
    teacher = Learner(replace(behemoth(), num_layers=8), remat="none")
    teacher = teacher if teacher_learns else replace(teacher, optimizer=None)
    students = {
        name: Learner(replace(MODELS[name](), num_layers=8), remat="none", distillation=Distillation("behemoth"))
        for name in ("maverick", "scout")
    }
    train = TrainConfig(batch=128, seq_len=8192)
    cfg = RunConfig("family", {"behemoth": teacher, **students}, train=train)
    program = count(cfg, make_mesh(cfg.mesh, devices("v5p:4x4x8")))
    assert {of: flops.once for of, flops in program.flops.items()} == pytest.approx(by_hand(cfg, program), rel=1e-9)
