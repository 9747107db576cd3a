"""Pretraining on a mixture: a table of domains in the manner of Llama 4's, with places for one's own documents.

What is published of that recipe: more than 30T tokens of text, image and video, 200 languages, more than 100 of them
with over 1B tokens, ten times Llama 3's multilingual tokens; not the shares. Those below are a starting point, of the
kind that Llama 3 published (half general knowledge, a quarter mathematics and reasoning, a sixth code, a twelfth
multilingual) with the multilingual part raised, and are to be tuned by ablation.

Languages are sampled by temperature: of n_l tokens in language l its share of the multilingual part is

    p_l = n_l^(1/tau) / sum_k n_k^(1/tau)

tau = 1 is by size, a large tau is uniform; mT5 chose 1/tau = 0.3. The larger tau, the sooner small languages repeat.

Image-text pairs and frames of videos stand in the same rows as text; their share counts the tokens of their tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from configs import full
from configs.pretrain import scout_8k, tiny, with_digits, with_images
from data.config import DataConfig
from training.config import MeshConfig, RunConfig, Schedule, Stage

TEMPERATURE = 1 / 0.3


@dataclass(frozen=True)
class Domain:
    """Where a domain is (see data/sources.py), and its share of the tokens."""

    place: str
    share: float


# Your documents go here: `llama4 data convert` makes ArrayRecord shards of what you have. All shares sum to 1.
DOMAINS = {
    "web": Domain("array_record:corpus/web", 0.45),
    "code": Domain("array_record:corpus/code", 0.14),
    "scientific": Domain("array_record:corpus/scientific", 0.09),
    "books": Domain("array_record:corpus/books", 0.07),
    "images": Domain("webdataset:corpus/images", 0.08),
    "videos": Domain("video:corpus/videos", 0.02),
}
MULTILINGUAL = 0.15
# The long-context stage: its part of all tokens, and by how much more often it reads what is long (untuned).
LONG = 0.05
LONGER = {"books": 4.0, "code": 2.0, "scientific": 2.0, "videos": 2.0}
TILES, LONG_TILES = 16, 256  # for which a short and a long row have room; the long one's are 48 images of 5, and more
# Language -> its tokens, in any unit, and a folder corpus/multilingual/LANGUAGE.
LANGUAGES = {
    "de": 300.0, "es": 280.0, "fr": 260.0, "ru": 250.0, "ja": 150.0, "zh": 140.0, "pt": 120.0, "it": 110.0, "pl": 60.0,
    "vi": 50.0, "tr": 45.0, "ar": 40.0, "id": 35.0, "ko": 30.0, "hi": 12.0, "th": 12.0, "sw": 1.0, "yo": 0.1,
}  # fmt: skip


def by_temperature(sizes: Mapping[str, float], tau: float) -> dict[str, float]:
    """p_l = n_l^(1/tau) / sum_k n_k^(1/tau), which sum to 1; `sizes` n_l and `tau` are above 0."""
    if not tau > 0 or not sizes or min(sizes.values()) <= 0:
        raise ValueError(f"temperature sampling needs sizes and a tau above 0, not {dict(sizes)} and {tau}")
    largest = max(sizes.values())
    powers = {name: (size / largest) ** (1 / tau) for name, size in sizes.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def raised(shares: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """The shares with some of them multiplied, made to sum to 1 again."""
    new = {name: share * factors.get(name, 1.0) for name, share in shares.items()}
    total = sum(new.values())
    return {name: share / total for name, share in new.items()}


def mixture(domains: Mapping[str, Domain], languages: Mapping[str, Domain], vocab_size: int) -> DataConfig:
    """The data section that reads all of these; ValueError where the shares do not sum to 1."""
    table = {**domains, **languages}
    total = sum(domain.share for domain in table.values())
    if abs(total - 1) > 1e-6 or len(table) < len(domains) + len(languages):
        raise ValueError(f"the shares of {len(table)} domains with different names must sum to 1, not {total:g}")
    sources = {name: domain.place for name, domain in table.items()}
    weights = {name: domain.share for name, domain in table.items()}
    return DataConfig(sources=sources, weights=weights, vocab_size=vocab_size)


def _languages() -> dict[str, Domain]:
    shares = by_temperature(LANGUAGES, TEMPERATURE)
    return {
        f"multilingual-{name}": Domain(f"array_record:corpus/multilingual/{name}", MULTILINGUAL * share)
        for name, share in shares.items()
    }


def scout_mix() -> RunConfig:
    """Scout with its vision tower, on a table of domains to fill in: text in many languages, images, videos.

    All else is as in `pretrain:scout_8k`. The last 5% of the tokens are in rows of 262,144, as in
    `pretrain:scout_256k`, and have more books, code and videos.

    Command:  llama4 train pretrain_mix:scout_mix --data.tokenizer tokenizer.model
              (documents under corpus/, or the places of `DOMAINS` in configs/pretrain_mix.py)
    Hardware: 128 v5p (v5p:4x4x8), for the long rows 256 (v5p:4x8x8), where the same command goes on
    Result:   never run; llama4 plan pretrain_mix:scout_mix --topology v5p:4x4x8
    """
    base = with_images(scout_8k(), "pretrain_mix:scout_mix", TILES)
    data = mixture(DOMAINS, _languages(), base.data.vocab_size)
    after, batch = round((1 - LONG) * base.train.steps), 8
    long_steps = round(LONG * full.TOKENS["scout"] / (batch * full.LONG))
    stage = Stage(
        after, batch, full.LONG, LONG_TILES, weights=raised(data.weights, LONGER), mesh=MeshConfig(context=32),
        microbatches=1, schedule=Schedule(full.LONG_RATE, decay=1.0, final=0.0),
    )  # fmt: skip
    train = replace(base.train, steps=after + long_steps)
    return replace(base, data=data, train=train, stages=(stage,))


def tiny_mix() -> RunConfig:
    """A tiny Scout on the embedded documents as a table of domains: 50% prose, 30% code, 20% digits.

    Command:  llama4 train pretrain_mix:tiny_mix
    Hardware: 2 CPU cores, two minutes
    Result:   a mixture that can be tried; not measured
    """
    shares = {"prose": 0.5, "code": 0.3, "digits": 0.2}
    table = {name: Domain(f"embedded:{name}", share) for name, share in shares.items()}
    base = with_digits(tiny(), "pretrain_mix:tiny_mix")
    data = mixture(table, {}, base.data.vocab_size)
    return replace(base, data=replace(data, heldout=base.data.heldout))


PRESETS = (scout_mix, tiny_mix)
