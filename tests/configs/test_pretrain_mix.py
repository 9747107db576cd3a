"""The table of domains: its shares sum to one, languages by temperature, and every place is of a known kind."""

from __future__ import annotations

import pytest

import configs
from configs import pretrain_mix as mix
from data.sources import KINDS


def test_temperature_goes_from_size_to_uniform():
    sizes = {"a": 800.0, "b": 100.0, "c": 100.0}
    assert mix.by_temperature(sizes, 1.0) == pytest.approx({"a": 0.8, "b": 0.1, "c": 0.1})
    assert mix.by_temperature(sizes, 3.0) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})  # cube roots 2, 1, 1
    assert mix.by_temperature(sizes, 1e9) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    for wrong, tau in ((sizes, 0.0), ({"a": 0.0}, 1.0), ({}, 1.0)):
        with pytest.raises(ValueError, match="temperature sampling needs"):
            mix.by_temperature(wrong, tau)


def test_the_table_is_a_mixture():
    data = configs.find("pretrain_mix:scout_mix").data
    assert data.sources.keys() == data.weights.keys() >= {"web", "images", "videos", "multilingual-sw"}
    assert sum(data.weights.values()) == pytest.approx(1)
    assert {place.partition(":")[0] for place in data.sources.values()} <= KINDS.keys()
    small, large = data.weights["multilingual-yo"], data.weights["multilingual-de"]
    assert large / small == pytest.approx(3000**0.3)


def test_its_long_stage_reads_what_is_long_for_a_twentieth_of_the_tokens():
    cfg = configs.find("pretrain_mix:scout_mix")
    (stage,) = cfg.stages
    long = cfg.at(stage.after)
    tokens = [stage.after * cfg.train.batch * cfg.train.seq_len,
              (cfg.train.steps - stage.after) * long.train.batch * long.train.seq_len]  # fmt: skip
    assert long.train.seq_len == 262_144 and tokens[1] / sum(tokens) == pytest.approx(0.05, rel=1e-3)
    before, then = cfg.data.weights, long.data.weights
    assert (cfg.images, long.images) == ((16, 336, 144), (256, 336, 144))
    assert before.keys() == then.keys() and sum(then.values()) == pytest.approx(1)
    assert then["books"] / then["web"] == pytest.approx(4 * before["books"] / before["web"])
    assert then["books"] > 2 * before["books"] and then["web"] < before["web"]


def test_shares_that_do_not_sum_to_one_are_refused():
    web = {"web": mix.Domain("jsonl:x", 0.6)}
    with pytest.raises(ValueError, match=r"must sum to 1, not 0\.6"):
        mix.mixture(web, {}, 512)
    with pytest.raises(ValueError, match="domains with different names"):
        mix.mixture(web, {"web": mix.Domain("jsonl:y", 1.0)}, 512)
