"""A whole run: resumed it equals the unbroken one bit by bit, and it stops, refuses and finishes in clear words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from data.config import DataConfig
from data.loader import Corpus
from training.checkpoint import Checkpoints, restore_params
from training.config import Distillation, MeshConfig, OptimizerConfig
from training.export_params import save_hf
from training.loop import train
from training.mesh import make_mesh
from training.metrics import read
from training.start import initial_state
from training.state import abstract_state


def story(cfg) -> list[dict]:
    """A run's records without what depends on the clock."""
    clock = {"time", "tokens_per_second", "seconds_per_step", "data_wait", "tflops"}
    return [
        {k: v for k, v in record.items() if k not in clock and "seconds/" not in k}
        for record in read(epath.Path(cfg.folder))
    ]


def quiet(_: str) -> None:
    """No lines."""


class Killed(Exception):
    """What a test ends a run with."""


def kill_at(corpus, step: int, act):
    """The corpus, calling `act` when the batch of `step` is asked for."""

    class Deadly:
        def __init__(self, stream):
            self.stream, self.asked = stream, 0
            self.get_state, self.set_state, self.close = stream.get_state, stream.set_state, stream.close

        def __next__(self):
            self.asked += 1
            if self.asked == step:
                act()
            return next(self.stream)

    def deadly(*args):
        return Deadly(type(corpus).train(corpus, *args))

    return deadly


@pytest.fixture(scope="module")
def whole(run_config, corpus, tmp_path_factory):
    """An unbroken run of eight steps."""
    cfg = run_config(tmp_path_factory.mktemp("whole") / "run")
    return cfg, train(cfg, corpus, quiet)


def test_a_run_learns_and_sums_up(whole, corpus):
    cfg, summary = whole
    records = story(cfg)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["step"] for r in records if "eval/ce" in r] == [4, 8]
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["eval/ce"] < records[0]["ce"]
    assert {"ce/even", "eval/ce/odd", "imbalance/1", "expert_share", "grad_norm"} <= set(records[-1])
    assert summary["complete"] and summary["step"] == 8 and summary["signal"] is None
    assert summary["metrics"]["eval/ce"] == records[-1]["eval/ce"]
    folder = Path(cfg.folder)
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 8
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["4", "8"]
    lines = []
    assert train(cfg, corpus, lines.append)["complete"] and story(cfg) == records
    assert lines == [f"{folder} is complete already: 8 steps of 8"]


def test_resumed_equals_unbroken(whole, make_run, corpus, monkeypatch):
    """Ended by an exception before step 6, with checkpoints at 2 and 4 and records up to 4 or 5, and started again."""
    cfg = make_run("broken", checkpoint_every=2)

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train", kill_at(corpus, 6, die), raising=True)
        with pytest.raises(Killed):
            train(cfg, corpus, quiet)
    lines = []
    train(cfg, corpus, lines.append)
    assert any("going on after step 4" in line for line in lines)
    assert story(cfg) == story(whole[0])
    ours, theirs = (restore_params(c.folder).params for c in (cfg, whole[0]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(whole, make_run, corpus, monkeypatch, number):
    cfg, lines = make_run("stopped"), []
    handlers = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train", kill_at(corpus, 3, lambda: os.kill(os.getpid(), number)))
        summary = train(cfg, corpus, lines.append)
    assert summary["signal"] == number and summary["step"] == 3 and not summary["complete"]
    assert f"{number.name}: stopped after step 3 of 8, checkpoint saved" in lines[-1]
    assert signal.getsignal(number) is handlers
    train(cfg, corpus, quiet)
    assert story(cfg) == story(whole[0])


def test_another_mesh_goes_on(whole, make_run, corpus):
    """Rounding differs, the data and the weights do not."""
    half = make_run("half", steps=8, mesh=MeshConfig(fsdp=2, expert=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "train", kill_at(corpus, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        train(half, corpus, quiet)
    lines = []
    train(replace(half, mesh=MeshConfig()), corpus, lines.append)
    assert any("going on after step 5" in line and "mesh.fsdp: 2 -> -1" in line for line in lines)
    losses = [[r["loss"] for r in story(cfg)] for cfg in (half, whole[0])]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_another_run_is_refused(whole, corpus):
    cfg, _ = whole
    for changed, text in (
        (replace(cfg, train=replace(cfg.train, seed=3)), r"train\.seed = 0, not 3"),
        (replace(cfg, train=replace(cfg.train, steps=16, batch=16)), r"train\.batch = 8, not 16"),
    ):
        with pytest.raises(ValueError, match=text):
            train(changed, corpus, quiet)


def test_too_small_a_vocabulary_is_refused(make_run, corpus):
    cfg = make_run()
    model = replace(cfg.learners["scout"].model, vocab_size=128)
    with pytest.raises(ValueError, match=r"scout's model\.vocab_size is 128, but the tokenizer has 320 tokens"):
        train(replace(cfg, learners={"scout": replace(cfg.learners["scout"], model=model)}), corpus, quiet)


def test_weights_from_elsewhere(whole, make_run, tmp_path):
    """hf:DIR and run:DIR begin with the weights of an export or of another run; another shape is refused."""
    cfg, _ = whole
    params = restore_params(cfg.folder).params
    save_hf(params, cfg.learners["scout"].model, tmp_path / "hf", dtype="float32")
    mesh = make_mesh(MeshConfig(expert=2))
    for init in (f"hf:{tmp_path / 'hf'}", f"run:{cfg.folder}"):
        new = make_run("new")
        learner = replace(new.learners["scout"], init=init)
        state = initial_state(replace(new, learners={"scout": learner}), mesh)
        for ours, theirs in zip(jax.tree.leaves(state.learners["scout"].params), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert jax.tree.structure(state) == jax.tree.structure(abstract_state(new, mesh))
        other = replace(learner, model=replace(learner.model, num_layers=2))
        with pytest.raises(ValueError, match=r"has num_layers = 4, but scout's model has 2"):
            initial_state(replace(new, learners={"scout": other}), mesh)

    # A router's bias, which no export has, begins at zero.
    new = make_run("biased")
    learner = new.learners["scout"]
    learner = replace(learner, init=f"hf:{tmp_path / 'hf'}", model=replace(learner.model, router_bias=True))
    ours = dict(nnx.to_flat_state(initial_params(replace(new, learners={"scout": learner}), "scout")))
    assert not any(ours.pop(path).get_value().any() for path in list(ours) if path[-1] == "bias_E")
    for path, p in nnx.to_flat_state(params):
        np.testing.assert_array_equal(ours.pop(path).get_value(), p.get_value())
    assert not ours


def test_several_learners(make_run, corpus):
    """A frozen teacher and its student: metrics carry the student's name, and both come back from a checkpoint."""
    cfg = make_run(steps=2, eval_every=2)
    scout = cfg.learners["scout"]
    student = replace(scout, distillation=Distillation("teacher"))
    cfg = replace(cfg, learners={"teacher": replace(scout, optimizer=None), "scout": student})
    records = train(cfg, corpus, quiet) and story(cfg)
    assert {"scout/loss", "scout/kl/odd", "scout/eval/ce/even"} <= set(records[-1])
    assert {key for key in records[-1] if key.startswith("teacher/")} == {
        f"teacher/eval/{what}{of}" for what in ("ce", "accuracy", "entropy", "ece") for of in ("", "/even", "/odd")
    }  # a frozen learner is evaluated, and has nothing else to report
    first = restore_params(cfg.folder, "teacher").params
    for ours, theirs in zip(*(jax.tree.leaves(p) for p in (first, initial_params(cfg, "teacher"))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="several learners, name one of teacher, scout"):
        restore_params(cfg.folder)


def initial_params(cfg, name: str):
    return initial_state(cfg, make_mesh(MeshConfig())).learners[name].params


DRIVER = """
import sys
from dataclasses import replace
from configs import find
from data.config import DataConfig
from data.loader import Corpus
from training.loop import train
documents, cache, out = sys.argv[1:]
cfg = find("pretrain:tiny")
scout = cfg.learners["scout"]
model = replace(scout.model, vocab_size=320, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=8, expert_dim=16,
                num_experts=4, chunk=16)
data = DataConfig(sources={"text": documents}, vocab_size=320, heldout=0.1)
portions = replace(cfg.train, steps=200, batch=8, seq_len=32, log_every=1, eval_every=50, eval_batches=2,
                   checkpoint_every=20)
cfg = replace(cfg, learners={"scout": replace(scout, model=model)}, data=data, train=portions, out=out)
train(cfg, Corpus.open(data, cache))
"""


@pytest.mark.slow
def test_killed_run_equals_unbroken(documents, tmp_path):
    """SIGKILL at about step 100 of 200; the second start goes on, and every loss is what it would have been."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(out: str) -> subprocess.Popen:
        root = Path(__file__).parents[2]
        return subprocess.Popen([sys.executable, tmp_path / "driver.py", documents, tmp_path / "cache", tmp_path / out],
                                env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL)  # fmt: skip

    def losses(out: str) -> dict[int, float]:
        return {r["step"]: r["loss"] for r in read(epath.Path(tmp_path / out))}

    assert start("whole").wait() == 0
    broken = start("broken")
    while max(losses("broken"), default=0) < 100 and broken.poll() is None:
        time.sleep(0.01)
    broken.kill()
    assert broken.wait() == -signal.SIGKILL
    killed = max(losses("broken"))
    assert 100 <= killed < 200
    assert start("broken").wait() == 0
    assert losses("broken") == losses("whole") and sorted(losses("whole")) == list(range(1, 201))


def test_weights_with_another_tokenizer_are_refused(make_run, corpus, documents, tmp_path):
    """Token ids mean something else there, though the vocabulary's size may be the same."""
    source = epath.Path(tmp_path / "source")
    corpus.tokenizer.save(source)
    (source / "config.json").write_text("{}")
    cfg = make_run()
    learner = replace(cfg.learners["scout"], init=f"run:{source}")
    other = Corpus.open(
        DataConfig(sources={"text": str(documents)}, vocab_size=310, heldout=0.1), tmp_path / "cache", log=quiet
    )
    with pytest.raises(ValueError, match=r"another tokenizer than this run: give --data.tokenizer .*tokenizer.model"):
        train(replace(cfg, learners={"scout": learner}), other)


def test_gradients_that_stay_infinite_end_the_run_and_are_never_saved(make_run, corpus, monkeypatch):
    """At a rate that throws the weights far off: steps are skipped, the run goes back, and at last it stops."""
    cfg = make_run(checkpoint_every=1, steps=20)
    wild = replace(cfg.learners["scout"], optimizer=OptimizerConfig(learning_rate=1e38, warmup=0, decay=0.0))
    with pytest.raises(FloatingPointError, match="not finite, 3 steps in a row; the run went back 3 times already"):
        train(replace(cfg, learners={"scout": wild}), corpus, quiet)
    with Checkpoints(epath.Path(cfg.folder)) as checkpoints:
        params = restore_params(cfg.folder, step=checkpoints.latest).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_to_begin_from_must_be_there_and_hold_the_learner(make_run, corpus):
    cfg = make_run()
    scout = cfg.learners["scout"]
    with pytest.raises(FileNotFoundError, match=r"scout's init is run:nowhere, .* is missing; train it first"):
        train(replace(cfg, learners={"scout": replace(scout, init="run:nowhere")}), corpus, quiet)
    two = replace(make_run("two", steps=1), learners={"a": scout, "b": scout})
    train(two, corpus, quiet)
    with pytest.raises(ValueError, match=r"holds a, b, none of them called 'scout'"):
        train(replace(cfg, learners={"scout": replace(scout, init=f"run:{two.folder}")}), corpus, quiet)
