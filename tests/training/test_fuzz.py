"""Whatever a configuration or a command line holds, it is taken or refused in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configs
from launch import cli
from training.config import RunConfig
from training.record import config_from_json, flat, run_record

RECORDS = [run_record(configs.find(name), "0")["config"] for name in ("pretrain:tiny", "codistill:tiny")]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def put(tree: Any, path: str, value: Any) -> None:
    *folders, last = path.split(".")
    for name in folders:
        tree = tree[int(name) if isinstance(tree, list) else name]
    tree[int(last) if isinstance(tree, list) else last] = value


@pytest.mark.parametrize("record", RECORDS, ids=["one", "several"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_field_of_a_configuration_may_be_anything(record, data):
    tree = copy.deepcopy(record)
    paths = sorted(flat(record))
    sections = sorted({path.rpartition(".")[0] for path in paths if "." in path})
    for path in data.draw(st.lists(st.sampled_from(paths + sections), min_size=1, max_size=2)):
        try:
            put(tree, path, data.draw(JSON))
        except (KeyError, TypeError, ValueError, IndexError):  # what was replaced before it
            continue
    try:
        assert isinstance(config_from_json(tree), RunConfig)
    except ValueError as error:
        assert str(error) and len(str(error)) < 1000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.sampled_from(
            [
                "train",
                "plan",
                "checkpoint",
                "list",
                "verify",
                "pretrain:tiny",
                "--json",
                "--train.steps",
                "--from",
                "x@y",
                "-1",
                "nan",
                "--mesh.fsdp=0",
                "--learners.scout.remat",
            ]
        )
        | st.text(max_size=6),
        max_size=5,
    ).filter(
        lambda words: (
            not {"-h", "--help"} & set(words)
            and words[:2] != ["train", "pretrain:tiny"]
            and words[:1] not in (["plan"], ["demo"], ["bench"])
        )
    )
)
@example(words=["checkpoint", "list", "\x00"])
def test_any_command_line_is_refused_in_a_line(words, capsys):
    """Those that would begin to work are left out."""
    status = cli.main(list(words))
    assert status == 2, words
    lines = capsys.readouterr().err.splitlines()
    assert lines and lines[-1].startswith("llama4: error: "), (words, lines)


def test_a_configuration_says_what_is_wrong():
    tree = json.loads(json.dumps(RECORDS[0]))
    for path, value, line in (
        ("train.steps", "5", "config.train.steps must be int, not '5'"),
        ("train.steps", True, "config.train.steps must be int, not True"),
        ("learners", [], r"config.learners must be Mapping, not \[\]"),
        ("learners.scout.remat", "all", "config.learners.scout.remat must be one of none, .*, not 'all'"),
        ("mesh", 1, "config.mesh must be Mapping, not 1"),
    ):
        changed = copy.deepcopy(tree)
        put(changed, path, value)
        with pytest.raises(ValueError, match=line):
            config_from_json(changed)
