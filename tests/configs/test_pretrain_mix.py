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
    assert data.sources.keys() == data.weights.keys() >= {"web", "code", "scientific", "books", "multilingual-sw"}
    assert sum(data.weights.values()) == pytest.approx(1)
    assert {place.partition(":")[0] for place in data.sources.values()} <= KINDS.keys()
    small, large = data.weights["multilingual-yo"], data.weights["multilingual-de"]
    assert large / small == pytest.approx(3000**0.3)


def test_shares_that_do_not_sum_to_one_are_refused():
    web = {"web": mix.Domain("jsonl:x", 0.6)}
    with pytest.raises(ValueError, match=r"must sum to 1, not 0\.6"):
        mix.mixture(web, {}, 512)
    with pytest.raises(ValueError, match="domains with different names"):
        mix.mixture(web, {"web": mix.Domain("jsonl:y", 1.0)}, 512)
