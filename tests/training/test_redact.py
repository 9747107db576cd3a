"""Secrets are not shown: in errors, in a run's lines, in reports."""

from __future__ import annotations

import pytest

from launch import cli
from training.metrics import Console
from training.page import page
from training.redact import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HF_TOKEN=abc123 and on", "HF_TOKEN=*** and on"),
        ('{"AWS_SECRET_ACCESS_KEY": "wJal/rX"}', '{"AWS_SECRET_ACCESS_KEY": "***"}'),
        ("s3://user:pa55@host/bucket", "s3://user:***@host/bucket"),
        ("https://:pw@host", "https://:***@host"),
        ("hf_" + "a1" * 17, "***"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("AKIA" + "A" * 16, "***"),
        ("step 3/9  loss 1.25  320 tokens/s", "step 3/9  loss 1.25  320 tokens/s"),
        ("data.tokenizer: a -> b; tokens: 5", "data.tokenizer: a -> b; tokens: 5"),
        ("gs://bucket/a:b@c", "gs://bucket/a:b@c"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text, shown):
    assert redact(text, {}) == shown


def test_values_of_secret_variables_are_hidden_anywhere(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("KEYBOARD", "qwertyqwerty")
    assert redact("x0123456789abcdefy qwertyqwerty") == "x***y qwertyqwerty"
    assert cli.main(["train", "0123456789abcdef/x"]) == 2
    assert "0123456789abcdef" not in capsys.readouterr().err
    assert "0123456789abcdef" not in page("t", ["s"], "<p>0123456789abcdef</p>")


def test_lines_of_a_run_hide_them(make_run):
    lines = []
    console = Console(make_run(), 0, lines.append)
    console.line("reads s3://me:secret@host/b")
    console.close()
    assert lines == ["reads s3://me:***@host/b"]
