"""`llama4 targets`: a preset's teacher over its rows, gone on with after a kill, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from support import error, output

import configs
from data.loader import Corpus
from launch import cli, overrides
from launch.startup import open_corpus
from training.checkpoint import Checkpoints, load_config, restore_params
from training.mesh import make_mesh
from training.record import run_record, write_config
from training.state import create_state, graphdef
from training.targets import Reader

MODEL = (
    "--model.chunk 16 --model.embed-dim 32 --model.head-dim 8 --model.num-heads 2 --model.num-kv-heads 2"
    " --model.expert-dim 16 --model.dense-dim 16 --model.num-experts 2"
)
ROWS = "--data.vocab-size 320 --data.heldout 0.2 --train.batch 8 --train.seq-len 32 --train.eval-batches 2"


@pytest.fixture
def write(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that writes the targets of a run of six steps, once there is a teacher: weights as a run keeps them."""
    monkeypatch.chdir(corpus.parent)
    line = f"--data.sources text={corpus} {ROWS} {MODEL} --train.steps 6"
    args = argparse.Namespace(overrides=overrides.split(line.split(), [])[1], options=[])
    cfg = replace(overrides.apply(configs.find("pretrain:tiny"), args), out="teacher")
    tokenizer = open_corpus(cfg, log=lambda _: None).tokenizer
    with Checkpoints("teacher", keep=1) as checkpoints:
        checkpoints.save(2, create_state(cfg, make_mesh(cfg.mesh)), {}, run_record(cfg, tokenizer.hash))
    write_config(epath.Path("teacher"), cfg)
    tokenizer.save("teacher")
    return f"targets write pretrain:tiny {line} --init run:teacher --top 4 --draws 2"


def test_write_go_on_and_read(write: str, corpus: Path, capsys):
    line = f"{write} --out store"
    facts = output(f"{line} --batches 3", capsys)
    assert (facts["kind"], facts["top"], facts["draws"], facts["temperature"]) == ("stratified", 4, 2, 1)
    assert facts["teacher_step"] == 2 and facts["source"] == "run:teacher" and facts["vocab_size"] == 320
    assert facts["written"]["batches"] == 3 + 2 and facts["written"]["tokens"] == facts["tokens"]
    assert facts["bytes_per_token"] == pytest.approx(facts["bytes"] / facts["tokens"], abs=0.01)

    # On another mesh it is the same teacher: what is there is passed over, the rest is added.
    more = output(f"{line} --mesh.fsdp 2 --mesh.tensor 2 --mesh.expert 2", capsys)
    assert more["teacher"] == facts["teacher"] and more["written"]["passed"] >= 5
    assert more["tokens"] == facts["tokens"] + more["written"]["tokens"] > facts["tokens"]
    again = output(line, capsys)
    assert again["written"]["passed"] == again["written"]["batches"] and again["written"]["tokens"] == 0

    # All that a run over these rows reads is there, and is what the teacher says.
    cfg = load_config("teacher")
    data = Corpus.open(cfg.data, corpus.parent / "cache" / "llama4_jax")
    shape = (8, 32, 16)
    stream = data.train(*shape, cfg.train.seed)
    with Reader("store", tokenizer=data.tokenizer.hash, vocab_size=320) as reader:
        batches = [next(stream) for _ in range(6)] + data.heldout(*shape, 2)
        found = [reader.look_up(batch) for batch in batches]
    stream.close()
    for batch, t in zip(batches, found, strict=True):
        assert np.array_equal(t.present, batch.segment_ids > 0)
    check_against_the_teacher(batches[0], found[0])

    assert cli.main(["targets", "info", "store"]) == 0
    shown = capsys.readouterr().out
    assert f"{more['tokens']:,} tokens" in shown and "run:teacher at step 2" in shown and "bytes a token" in shown
    assert output("targets info store", capsys)["pieces"] == more["pieces"]


def check_against_the_teacher(batch, t):
    """Against logits of the whole vocabulary."""
    weights = restore_params("teacher")
    learner = weights.config.learners["scout"]
    out = nnx.merge(graphdef(learner), weights.params)(
        *map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))
    )
    logp = np.asarray(jax.nn.log_softmax(out.hidden @ out.unembedding, axis=-1))
    near = dict(rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(t.entropy[t.present], -(np.exp(logp) * logp).sum(-1)[t.present], **near)
    label = np.take_along_axis(logp, batch.labels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(t.label_logp[t.present], label[t.present], **near)
    top = np.take_along_axis(logp, np.maximum(t.ids, 0), axis=-1)[..., :4]
    np.testing.assert_allclose(t.mass[..., :4][t.present], np.exp(top)[t.present], rtol=0.07, atol=1e-3)
    assert np.mean(t.ids[..., 0][t.present] == logp.argmax(-1)[t.present]) > 0.99
    np.testing.assert_allclose(t.mass.sum(-1)[t.present], 1, atol=1e-5)


def test_wrong_input_is_one_line(write: str, capsys):
    preset, rest = write.split()[2], write.split(maxsplit=3)[3]
    assert "invalid choice: 'topp'" in error(f"{write} --out store --kind topp", capsys)
    assert "at least 1 draw, not 0" in error(f"{write} --out store --draws 0", capsys)
    assert "give --out DIR" in error(write, capsys)
    assert "--batches must be at least 1" in error(f"{write} --out store --batches 0", capsys)
    assert "no complete shard" in error("targets info store", capsys)
    assert "takes no field --train.steps" in error("targets info store --train.steps 4", capsys)
    without = rest.replace("--init run:teacher", "")
    assert "has no teacher: scout has no weights" in error(f"targets write {preset} {without} --out store", capsys)
    missing = rest.replace("run:teacher", "run:nowhere")
    assert "nowhere/config.json is missing" in error(f"targets write {preset} {missing} --out store", capsys)
    learners = "no frozen teacher: name one with --learner, of behemoth, maverick, scout"
    assert learners in error("targets write codistill:tiny_cotrained --out store", capsys)
    assert "no learner 'scuot'" in error("targets write codistill:tiny --learner scuot --out store", capsys)

    manifest = output(f"{write} --batches 1 --out store", capsys)
    assert "of draws 2, but what is to be written has 3" in error(f"{write} --out store --draws 3", capsys)
    path = next(Path("store").glob("*.json"))
    whole = json.loads(path.read_text())
    for name, what in [("teacher", "teacher"), ("tokenizer", "tokenizer")]:
        path.write_text(json.dumps(whole | {name: "another"}))
        line = error(f"{write} --batches 1 --out store", capsys)
        assert f"store holds targets of {what} another, but what is to be written has {manifest[name]}" in line


def test_serve_until_a_signal(write: str, corpus: Path, capsys):
    """A student asks, and SIGTERM ends the server with status 0."""
    from data import tokenizer
    from data.loader import Corpus
    from training.checkpoint import load_config
    from training.stream import Stream

    cfg = load_config("teacher")
    data = Corpus.open(cfg.data, corpus.parent / "cache" / "llama4_jax")
    rows = data.train(8, 32, 16, cfg.train.seed)
    batch, found = next(rows), []
    rows.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def student() -> None:
        try:
            source = Stream(address, tokenizer.load("teacher").hash, 320, 16, patience=300.0)
            found.append(source.look_up(batch))
            source.close()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=student)
    asking.start()
    assert cli.main([*write.replace("targets write", "targets serve").split(), "--listen", address]) == 0
    asking.join()
    assert np.array_equal(found[0].present, batch.segment_ids > 0)
    check_against_the_teacher(batch, found[0])
    shown = capsys.readouterr().out
    assert "run:teacher at step 2" in shown and f"\nlistening on {address}\n" in shown


def test_serve_refuses_in_one_line(write: str, capsys):
    serve = write.replace("targets write", "targets serve")
    assert "takes no --out" in error(f"{serve} --out store", capsys)
    assert "an address is HOST:PORT" in error(f"{serve} --listen here", capsys)
    assert "with a port of at most 65535" in error(f"{serve} --listen localhost:70000", capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}: Address already in use" in error(f"{serve} --listen {address}", capsys)


def test_a_teacher_that_never_comes_is_a_failure(write: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.stream.PATIENCE", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = write.replace("targets write", "train").replace("--init run:teacher", "").replace("--top 4 --draws 2", "")
    assert cli.main([*line.split(), "--out", "run", "--distillation.teacher", f"stream:{address}"]) == 1
    assert f"error: no teacher at {address} for" in capsys.readouterr().err.splitlines()[-1]
