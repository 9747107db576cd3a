"""Every preset is a run that could start."""

from __future__ import annotations

import inspect
import re

import pytest

import configs
from launch import overrides


@pytest.mark.parametrize("name", configs.PRESETS)
def test_preset(name: str):
    cfg = configs.find(name)
    assert cfg.name == name
    overrides.check_vocabulary(cfg)
    doc = inspect.getdoc(configs.PRESETS[name]) or ""
    assert re.fullmatch(r"\S.{10,100}\.", doc.splitlines()[0])
    assert re.search(rf"^Command:  llama4 train {name}(?: -.*)?$", doc, re.MULTILINE)
    assert re.search(r"^Hardware: .+", doc, re.MULTILINE)
    assert re.search(r"^Result:   .+", doc, re.MULTILINE)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'pretrain:tyni'; the nearest is 'pretrain:tiny'"):
        configs.find("pretrain:tyni")
