"""Model FLOPs by hand: what a token of a row costs, part by part, with nothing computed twice.

A multiplication and an addition are two; only matrix products count (norms, softmax, rotations and lookups in the
embedding do not). With the house letters (`llama4_jax/axes.py`), A experts a token visits and T tokens of a row, a
token's forward pass costs in each layer

    projections       2 D H (2 N + 2 K)             queries and outputs, keys and values
    attention         4 N H S                       scores and values against the S keys it sees
    dense             6 D F                         SwiGLU, F = dense_dim, where a layer is not MoE; where it is:
    router            2 D E
    experts           6 D F A                       F = expert_dim
    shared_expert     6 D F

and once, behind them, `head` 2 D V. A causal query at position p of a row sees p + 1 keys, (T + 1) / 2 in the mean;
that is S of a global layer, and (C + 1) / 2 of a local one, with chunks of C = min(chunk, T) tokens. Documents packed
into a row see less: for them these are upper bounds. Backward is twice the forward pass (one product each for the
gradients of both factors).

A vision tower costs by tile, whether images fill a row's room for tiles or not: with P patches (and the class token)
of C values, M tokens of W values behind pixel shuffle, and the tower's own letters,

    vision            2 (P-1) C D + L P (8 D N H + 4 P N H + 4 D F) + 2 M (W A + A A + A U)

Backward is twice that but for the patches, which have no gradient; where only the projector learns (2 M A U), that of
its weights alone.

A frozen teacher runs forward alone and stops before its head, which each of its students multiplies with once: U its
width, 2 U V more under the student's `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llama4_jax.config import ModelConfig
from training.config import RunConfig

ATTENTION = ("attention_local", "attention_global")


def forward(model: ModelConfig, seq_len: int) -> dict[str, int]:
    """FLOPs a token of a forward pass, by part; parts are named as scopes of the program are (`training/program.py`).

    `seq_len` is a multiple of the chunk or at most one, as everywhere (`TrainConfig`).
    """
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    L, moe_layers, F = model.num_layers, model.num_moe_layers, model.expert_dim
    local = model.num_blocks * sum(kind.local for kind in model.pattern)
    return {
        "projections": L * 2 * D * H * (2 * N + 2 * K),
        "attention_local": local * 2 * N * H * (min(model.chunk, seq_len) + 1),
        "attention_global": (L - local) * 2 * N * H * (seq_len + 1),
        "dense": (L - moe_layers) * 6 * D * model.dense_dim,
        "router": moe_layers * 2 * D * model.num_experts,
        "experts": moe_layers * 6 * D * F * model.experts_per_token,
        "shared_expert": moe_layers * 6 * D * F,
        "head": 2 * D * model.vocab_size,
    }


def vision(model: ModelConfig, learns: Literal["all", "projector", "none"]) -> int:
    """FLOPs of a tile: forward, and backward of what learns."""
    v = model.vision
    if v is None:
        return 0
    P, D, W, A = v.grid**2 + 1, v.embed_dim, v.shuffle**2 * v.embed_dim, v.adapter_dim
    patches = 2 * (P - 1) * 3 * v.patch_size**2 * D
    layers = v.num_layers * P * (8 * D * D + 4 * P * D + 4 * D * v.mlp_dim)
    adapter, projector = 2 * v.tile_tokens * (W * A + A * A), 2 * v.tile_tokens * A * model.embed_dim
    once = patches + layers + adapter + projector
    return once + dict(all=patches + 2 * (layers + adapter + projector), projector=projector, none=0)[learns]


def per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of training on one token: forward and backward."""
    return 3 * sum(forward(model, seq_len).values())


def active_matmul_parameters(model: ModelConfig) -> int:
    """Weights that a token is multiplied with, 2 FLOPs each: all but the embedding, norms and experts not visited."""
    return sum(flops for part, flops in forward(model, 1).items() if part not in ATTENTION) // 2


def of_step(cfg: RunConfig) -> Mapping[tuple[str, str], int | float]:
    """FLOPs a token of a step of all learners, by learner and part."""
    step: dict[tuple[str, str], int | float] = {}
    for name, learner in cfg.learners.items():
        if cfg.images:
            tile = vision(learner.model, learner.optimizer.vision if learner.optimizer else "none")
            step[name, "vision"] = tile * cfg.train.tiles / cfg.train.seq_len
        for part, flops in forward(learner.model, cfg.train.seq_len).items():
            step[name, part] = 3 * flops if learner.optimizer else flops
        if not learner.optimizer:
            step[name, "head"] = 0
        if teacher := cfg.learners.get(learner.distillation.teacher):
            step[name, "head"] += 2 * teacher.model.embed_dim * teacher.model.vocab_size
    return step


def step_per_token(cfg: RunConfig) -> int | float:
    """FLOPs a token of a step of all learners: what MFU is of."""
    return sum(of_step(cfg).values())
