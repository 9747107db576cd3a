"""What a model is: frozen dataclasses, the layer pattern, and the family's presets. Imports nothing heavy.

Sources: the Llama 4 model card, Meta's `llama-models` and the `transformers` implementation; Behemoth's shape is
unpublished and is our proposal (docs/decisions.md), sized to 288B active of about 2T parameters with 16 experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rope:
    """Rotary embedding with Llama 3's frequency scaling; `factor` 1 leaves the frequencies as they are."""

    theta: float = 500_000.0
    """Base of the geometric series of frequencies, w_i = theta^(-2i/H)."""
    factor: float = 1.0
    """Slow frequencies are divided by this."""
    low: float = 1.0
    """Wavelengths longer than original/low are scaled."""
    high: float = 1.0
    """Wavelengths shorter than original/high are left alone; those between are interpolated."""
    original: int = 8192
    """Context length the unscaled frequencies were made for."""

    def __post_init__(self):
        if self.factor < 1 or self.low > self.high:
            raise ValueError(f"rope needs factor >= 1 and low <= high, not {self.factor}, {self.low}, {self.high}")


@dataclass(frozen=True)
class LayerKind:
    """What sets one layer apart from the next: its attention and its feed-forward part."""

    local: bool  # chunk-local attention with RoPE; else global attention without positions (NoPE)
    moe: bool  # mixture of experts; else a dense SwiGLU


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (`llama4_jax/vision.py`), the same in Scout and Maverick."""

    embed_dim: int = 1408
    """D, width of the tower's residual stream."""
    num_layers: int = 34
    """Layers of the tower."""
    num_heads: int = 16
    """N, heads of its attention; the width of one is a multiple of 4."""
    mlp_dim: int = 5632
    """F of its layers."""
    image_size: int = 336
    """Pixels of a tile's side."""
    patch_size: int = 14
    """Pixels of a patch's side; the patches of a tile's side are a multiple of shuffle."""
    shuffle: int = 2
    """Squares of so many patches a side become one token of the text model."""
    adapter_dim: int = 4096
    """Width between the tower and the projector into the text model."""
    rope_theta: float = 10_000.0
    """Base of the frequencies of rows and columns."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices; projections back into the residual stream get 1/sqrt(2L) of it."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"vision config: {name} must be above 0, not {value}")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(f"vision config: embed_dim ({self.embed_dim}) must be a multiple of 4 num_heads "
                             f"({4 * self.num_heads}), as rows and columns turn pairs")  # fmt: skip
        if self.image_size % (self.patch_size * self.shuffle):
            step = self.patch_size * self.shuffle
            nearest = max(1, round(self.image_size / step)) * step
            raise ValueError(f"vision config: image_size ({self.image_size}) must be a multiple of patch_size x "
                             f"shuffle ({step}): the nearest is {nearest}")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def tile_tokens(self) -> int:
        """M, tokens of the text model that a tile becomes."""
        return (self.grid // self.shuffle) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """One member of the family. Sizes carry the house letters (`llama4_jax/axes.py`)."""

    vocab_size: int = 202_048
    """V, tokens of the vocabulary."""
    embed_dim: int = 5120
    """D, the width of the residual stream."""
    num_layers: int = 48
    """L; a multiple of the layer pattern's period."""
    num_heads: int = 40
    """N, query heads."""
    num_kv_heads: int = 8
    """K, key and value heads; N is a multiple of it."""
    head_dim: int = 128
    """H, width of a head; even."""
    dense_dim: int = 16_384
    """F of dense layers."""
    expert_dim: int = 8192
    """F of the routed experts and of the shared one."""
    num_experts: int = 16
    """E, routed experts of a MoE layer."""
    experts_per_token: int = 1
    """Routed experts a token visits beside the shared one."""
    router_bias: bool = False
    """Choose experts by logit plus a bias, which evens their loads without a loss and is 0 again after training."""
    moe_every: int = 1
    """Layer l (from 0) is MoE where (l + 1) is a multiple of this."""
    nope_every: int = 4
    """Layer l is global and NoPE where (l + 1) is a multiple of this; the others are chunk-local with RoPE."""
    chunk: int = 8192
    """Tokens of a document that local layers see together."""
    qk_norm: bool = True
    """Weightless RMS norm of queries and keys in RoPE layers, per head, after the rotation."""
    rope: Rope = field(default_factory=Rope)
    """Rotary embedding of the local layers."""
    temperature_tuning: bool = True
    """Scale the queries of NoPE layers by 1 + attn_scale ln(1 + floor((p + 1) / floor_scale))."""
    attn_scale: float = 0.1
    """Strength of the temperature tuning."""
    floor_scale: int = 8192
    """Step of the temperature tuning, in tokens."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMS norm."""
    max_position: int = 262_144
    """Longest context the model is meant for; recorded in exports, not enforced."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get 1/sqrt(2L) of it."""
    vision: VisionConfig | None = None
    """The tower whose output replaces the embeddings of image patches; None for a text model."""

    def __post_init__(self):
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"model config: {message}")

        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "dense_dim",
                     "expert_dim", "num_experts", "experts_per_token", "moe_every", "nope_every", "chunk",
                     "floor_scale"):  # fmt: skip
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        check(self.num_heads % self.num_kv_heads == 0,
              f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")  # fmt: skip
        check(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, not {self.head_dim}")
        check(self.experts_per_token <= self.num_experts,
              f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})")  # fmt: skip
        check(self.num_layers % self.period == 0,
              f"num_layers ({self.num_layers}) must be a multiple of the layer pattern's period, "
              f"lcm(nope_every, moe_every) = {self.period}: the nearest is "
              f"{max(1, round(self.num_layers / self.period)) * self.period}")  # fmt: skip

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats; the scan runs over blocks of this many."""
        return math.lcm(self.nope_every, self.moe_every)

    @property
    def num_blocks(self) -> int:
        return self.num_layers // self.period

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        """The kinds of one period of layers, e.g. Scout: three local MoE layers, then a global MoE layer."""
        return tuple(
            LayerKind(local=(i + 1) % self.nope_every != 0, moe=(i + 1) % self.moe_every == 0)
            for i in range(self.period)
        )

    @property
    def num_moe_layers(self) -> int:
        return self.num_blocks * sum(kind.moe for kind in self.pattern)


def with_vision(text: ModelConfig, vision: VisionConfig | None = None) -> ModelConfig:
    """The text model with a tower, by default the released models'."""
    return replace(text, vision=vision or VisionConfig())


def scout() -> ModelConfig:
    """Llama 4 Scout, 17B active of 109B: 16 experts, every layer MoE, QK-norm, RoPE scaled 16/1/1."""
    return ModelConfig(rope=Rope(factor=16.0), max_position=10_485_760)


def maverick() -> ModelConfig:
    """Llama 4 Maverick, 17B active of 402B: 128 experts in every other layer, no QK-norm, unscaled RoPE."""
    return ModelConfig(num_experts=128, moe_every=2, qk_norm=False, max_position=1_048_576)


def behemoth() -> ModelConfig:
    """Behemoth as we size it: 287B active of 2.01T, 88 layers, all MoE with 16 experts; else Scout's design."""
    return ModelConfig(
        embed_dim=16_384, num_layers=88, num_heads=128, expert_dim=26_624, dense_dim=53_248, rope=Rope(factor=16.0)
    )


def _tiny(full: ModelConfig, **sizes) -> ModelConfig:
    """`full` shrunk by the family's own ratios: same pattern, norms and scalings, a chunk of 128 tokens."""
    rope = replace(full.rope, theta=10_000.0, original=128)
    return replace(
        full, vocab_size=2048, head_dim=32, chunk=128, floor_scale=128, max_position=4096, rope=rope, **sizes
    )


def tiny_scout() -> ModelConfig:
    """Scout for a laptop: 4 layers, width 128, 4 experts."""
    return _tiny(scout(), embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, expert_dim=256, dense_dim=512,
                 num_experts=4)  # fmt: skip


def tiny_maverick() -> ModelConfig:
    """Maverick for a laptop: 4 layers, alternating dense and MoE, 8 experts."""
    return _tiny(maverick(), embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, expert_dim=256, dense_dim=512,
                 num_experts=8)  # fmt: skip


def tiny_behemoth() -> ModelConfig:
    """Behemoth for a laptop: half again as wide as its students, 4 experts."""
    return _tiny(behemoth(), embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, expert_dim=384, dense_dim=768,
                 num_experts=4)  # fmt: skip


def tiny_vision() -> VisionConfig:
    """The tower for a laptop: tiles of 16 pixels, which become 4 tokens; weights larger, as its sums are shorter."""
    return VisionConfig(
        embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256, image_size=16, patch_size=4, adapter_dim=128,
        init_std=0.08,
    )  # fmt: skip


MODELS = {f.__name__: f for f in (scout, maverick, behemoth, tiny_scout, tiny_maverick, tiny_behemoth)}
