"""`llama4 inspect` counts what the family publishes, and says what it does not know."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from flax import nnx

from launch import inspect
from llama4_jax.config import MODELS
from llama4_jax.text import Transformer

ACTIVE = {"scout": 17_172_894_720, "maverick": 17_184_691_200, "behemoth": 287_161_729_024}
TOTAL = {"scout": 107_769_861_120, "maverick": 400_711_848_960, "behemoth": 2_014_543_888_384}


def inspected(capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", TOTAL)
def test_presets_have_the_familys_totals(name):
    summary = inspect.describe(MODELS[name]())
    parameters = summary["parameters"]
    assert (parameters["total"], parameters["active"]) == (TOTAL[name], ACTIVE[name])
    assert sum(parameters["components"].values()) == TOTAL[name]
    for key in ("parameters", "active_parameters"):
        outside = sum(parameters["components"][c] for c in ("embedding", "unembedding")) + MODELS[name]().embed_dim
        expected = (TOTAL if key == "parameters" else ACTIVE)[name]
        assert sum(layer[key] for layer in summary["layers"]) + outside == expected


def test_components_of_maverick_are_their_formulas():
    components = inspect.describe(MODELS["maverick"]())["parameters"]["components"]
    expert = 3 * 5120 * 8192
    assert components == {
        "embedding": 202_048 * 5120,
        "unembedding": 202_048 * 5120,
        "attention": 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024),
        "dense": 24 * 3 * 5120 * 16_384,
        "router": 24 * 5120 * 128,
        "shared": 24 * expert,
        "experts": 24 * 128 * expert,
        "norms": (2 * 48 + 1) * 5120,
    }


def test_a_routers_bias_is_counted_with_the_router():
    plain = inspect.describe(MODELS["maverick"]())["parameters"]["components"]
    biased = inspect.describe(replace(MODELS["maverick"](), router_bias=True))["parameters"]["components"]
    assert biased == plain | {"router": plain["router"] + 24 * 128}


def test_a_tiny_model_counts_the_arrays_it_really_has():
    summary = inspect.describe(MODELS["tiny_maverick"]())
    model = Transformer(MODELS["tiny_maverick"](), nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    total = sum(math.prod(x.shape) for x in leaves)
    assert summary["parameters"]["total"] == total
    assert summary["bytes"] == {
        "weights_bf16": 2 * total,
        "weights_fp32": sum(x.nbytes for x in leaves),
        "adamw_moments_fp32": 8 * total,
        "adamw_training_state": 12 * total,
    }


def test_json_lists_every_layer(capsys):
    summary = json.loads(inspected(capsys, "maverick", "--json"))
    layers = summary["layers"]
    assert summary["name"] == "maverick" and summary["config"]["chunk"] == 8192
    assert [x["index"] for x in layers] == list(range(48))
    assert [x["index"] for x in layers if x["attention"] == "global"] == list(range(3, 48, 4))
    assert all((x["positions"] == "NoPE") == (x["attention"] == "global") for x in layers)
    assert [x["index"] for x in layers if x["feed_forward"] == "moe"] == list(range(1, 48, 2))
    assert {x["experts"] for x in layers[1::2]} == {128} and {x["experts"] for x in layers[0::2]} == {0}


def test_the_table_folds_equal_layers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = inspected(capsys, "scout")
    assert "107.77B parameters, 17.17B active" in out
    assert re.search(r"3, 7, …, 47 +│ global NoPE +│ MoE 1/16 +│", out)
    assert re.search(r"0, 4, …, 44 +│ local RoPE", out)
    assert "107,769,861,120" in out and "17,172,894,720" in out
    assert "dense feed-forward" not in out  # Scout has none
    assert "200.7 GiB" in out  # 2 bytes a weight
    assert re.search(r"0 +│ local RoPE", inspected(capsys, "tiny-behemoth"))


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'mavrick'; the nearest is 'maverick' \(all: scout, ") as error:
        inspect.run(argparse.Namespace(name="mavrick", json=False))
    assert "\n" not in str(error.value)


def test_its_help_imports_nothing_heavy():
    code = "import sys, launch.inspect; print([m for m in ('jax', 'flax', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
