"""A report is one well-formed file that stands alone, shows what a run has, says what it lacks, and never fails."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from llama4_jax.config import tiny_behemoth, tiny_maverick, tiny_scout
from training import figures, report
from training.config import Distillation, Learner, MeshConfig, RunConfig, Schedule, Stage, TrainConfig

DOMAINS = ("wiki", "code", "prose")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def learner_record(step: int, steps: int, end: float, experts: int, moe: tuple[int, ...], taught: bool, rng) -> dict:
    """What `training/metrics.py` writes of a learner, with losses that fall from ln 4096 towards `end`."""
    ce = end + (math.log(4096) - end) * math.exp(-5 * step / steps)
    rate = 3e-3 * min(1, step / 50, (steps - step) / (0.2 * steps) * 0.9 + 0.1)
    noise = rng.normal(0, 0.06)
    record = {"loss": ce + noise + 0.02, "ce": ce + noise, "grad_norm": 0.4 + abs(noise) * 4 + math.exp(-step / 40),
              "learning_rate": rate, "tokens": 3900.0, "balance": 1.1, "z": 2.0}  # fmt: skip
    record |= {f"ce/{name}": ce + noise + i / 4 for i, name in enumerate(DOMAINS)}
    if taught:
        soft = 0.9 * rate / 3e-3
        record |= {"soft": soft, "hard": 1 - soft, "kl": 0.2 + 2 * math.exp(-6 * step / steps) + abs(noise)}
    share = rng.dirichlet([20] * experts, len(moe))
    record |= {f"imbalance/{i}": float(s.max() * experts) for i, s in zip(moe, share, strict=True)}
    record |= {"imbalance": float(share.max() * experts), "expert_share": share.round(4).tolist()}
    if step % 100 == 0:
        record |= {"eval/ce": ce + 0.05}
        record |= {f"eval/ce/{name}": ce + 0.05 + i / 4 - 0.25 for i, name in enumerate(DOMAINS)}
    return record


def write_run(folder: Path, cfg: RunConfig, ends: dict[str, float]) -> Path:
    rng = np.random.default_rng(len(cfg.learners))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    lines = []
    for step in range(10, cfg.train.steps + 1, 10):
        record = {"step": step, "time": 1.7e9 + step, "seconds_per_step": 0.4, "tflops": 0.01}
        record |= {
            "tokens_seen": 3900 * step,
            "tokens_per_second": 9800 + 300 * rng.normal(),
            "data_wait": 0.01 + 0.005 * rng.random(),
        }
        for name, end in ends.items():
            learner = cfg.learners[name]
            moe = tuple(
                i for i in range(learner.model.num_layers) if learner.model.pattern[i % learner.model.period].moe
            )
            one = learner_record(step, cfg.train.steps, end, learner.model.num_experts, moe,
                                 bool(learner.distillation.teacher), rng)  # fmt: skip
            record |= {f"{name}/{key}" if len(cfg.learners) > 1 else key: value for key, value in one.items()}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def codistillation(folder: Path) -> Path:
    """A frozen Behemoth that teaches Maverick and Scout, with samples and a list of what was made."""
    taught = Distillation(teacher="behemoth")
    learners = {"behemoth": Learner(tiny_behemoth(), None, init="run:runs/teacher"),
                "maverick": Learner(tiny_maverick(), distillation=taught),
                "scout": Learner(tiny_scout(), distillation=taught)}  # fmt: skip
    cfg = RunConfig("codistill:tiny", learners, DataConfig(weights={"wiki": 0.5}), MeshConfig(expert=2),
                    TrainConfig(steps=600, seq_len=512))  # fmt: skip
    write_run(folder, cfg, {"maverick": 3.1, "scout": 3.2})
    samples = [{"learner": name, "prompt": "Once upon a time", "text": "Once upon a time there was a river."}
               for name in ("maverick", "scout")]  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(samples))
    contents(folder, "wiki", "A river in spring.")
    made = [{"what": "scout, bf16", "from": "step 600", "where": f"{folder.name}/hf/scout", "note": "agrees to 3e-7"}]
    (folder / "artifacts.json").write_text(json.dumps(made))
    return folder


def contents(folder: Path, name: str, text: str) -> None:
    """What `training/first_batches.py` writes."""
    sample = dict(row=0, at=0, tokens=9, counted=8, domain=name, document=3, begins=True, ends=True, cut=False,
                  text=text, spans=[["", False], [text, True]])  # fmt: skip
    facts = dict(step=1, batches=2, rows=16, tokens=4000, counted=3900, pieces=20, fill=0.98, pieces_per_row=1.25,
                 mixture={name: dict(target=0.5, read=0.52, tokens=4000)}, lengths=[[256, 4], [512, 16]],
                 samples=[sample])  # fmt: skip
    (folder / "data.json").write_text(json.dumps(facts))


def labels_alone(folder: Path) -> Path:
    cfg = RunConfig("pretrain:tiny", {"scout": Learner(tiny_scout())}, train=TrainConfig(steps=600, seq_len=512))
    return write_run(folder, cfg, {"scout": 3.28})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("runs")
    return str(codistillation(root / "codistill-tiny")), str(labels_alone(root / "ce-only"))


class Balanced(HTMLParser):
    """Collects the text, and fails where a tag is closed that is not the innermost open one."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.counts, self.colors = "", {}, set()
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def built(*folders) -> Balanced:
    page = report.build(report.load([str(f) for f in folders]))
    assert_stands_alone(page)
    out = Balanced(page)
    out.colors = set(re.findall(r"background:(#\w+)", page))
    return out


def assert_stands_alone(page: str) -> None:
    assert not re.search(r"https?://|<script|<link|@import|\bsrc=|url\((?!#)", page)
    targets = re.findall(r'href="([^"]{0,20})', page)
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert len(page.encode()) < 2_000_000


def rows(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def small(folder: Path, *records: object) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_codistillation_shows_everything(runs):
    page = built(runs[0])
    for words in ("Held-out loss", "Training loss", "Weights in the loss", "KL(teacher ‖ student)", "Expert load",
                  "Learning rate.", "Global gradient norm", "Tokens a second", "waiting for data", "Samples",
                  "A river in spring.", "98.0% full",
                  "Models and runs", "frozen teacher", "student of behemoth", "scout, bf16", "agrees to 3e-7",
                  "600 of 600", "expert 2, fsdp over the remaining devices", "run:runs/teacher"):  # fmt: skip
        assert words in page.text, words
    last = rows(runs[0])[-1]
    assert f"maverick {last['maverick/eval/ce']:.3f} and scout {last['scout/eval/ce']:.3f}" in page.text
    assert "Frozen, so without a curve: behemoth" in page.text and "Without an evaluation: behemoth" in page.text
    heat_maps = 2
    assert page.counts["figure"] == 2 + 2 + 2 + 2 + heat_maps + 1 + 2 + 2
    for nothing in ("Not recorded", "not recorded", "No "):
        assert nothing not in page.text


def test_stages_and_forks_are_told(tmp_path):
    long = Stage(400, batch=2, seq_len=2048, mesh=MeshConfig(context=4))
    cfg = RunConfig("pretrain:tiny", {"scout": Learner(tiny_scout())}, train=TrainConfig(steps=600, seq_len=512),
                    stages=(long, Stage(500, schedule=Schedule())), fork="runs/short@100")  # fmt: skip
    folder = write_run(tmp_path / "run", cfg, {"scout": 3.0})
    records = rows(folder)
    records[-1]["tokens_seen"] = 1_234_567  # counted, whatever a record's own tokens are
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = built(folder).text
    for words in ("8 × 512; after step 400 2 × 2048", "after step 400 context 4, fsdp over the remaining devices",
                  "runs/short@100", "600 of 600 steps and 1.23M tokens."):  # fmt: skip
        assert words in text, words
    assert "after step 500" not in text, "whose rows and mesh are the run's"


def test_parameters_are_those_of_the_tree(runs):
    from launch import inspect

    for model in (tiny_maverick(), tiny_scout()):
        counts = inspect.describe(model)["parameters"]
        assert report._parameters(dataclasses.asdict(model)) == (counts["total"], counts["active"])


def test_runs_side_by_side_differ_by_what_the_table_says(runs):
    page = built(*runs)
    first, second = (rows(r)[-1] for r in runs)
    change = second["eval/ce"] - first["scout/eval/ce"]
    assert f"{second['eval/ce']:.3f} {change:+.3f}" in page.text
    assert f"ce-only · scout ends {change:.3f} nats above codistill-tiny · scout." in page.text
    assert "do not compare" not in page.text
    assert len(page.colors) == 4


def test_another_tokenizer_is_said(tmp_path):
    folders = [small(tmp_path / name, {"step": 1, "eval/ce": 3.0}) for name in ("one", "two")]
    for folder, size in zip(folders, (4096, 512), strict=True):
        (folder / "config.json").write_text(json.dumps({"data": {"vocab_size": size}}))
    assert "nats a token do not compare" in built(*folders).text


def test_what_is_missing_is_said(tmp_path):
    text = built(small(tmp_path / "bare", {"step": 1, "note": "x"})).text
    for words in ("No evaluation on held-out documents is recorded.", "No losses are recorded.",
                  "No learner has a teacher.", "No loads of experts are recorded.", "Not recorded: learning rate.",
                  "Not recorded: gradient norm.", "Not recorded: tokens a second.", "No samples were kept.",
                  "What the batches held was not kept: bare.",
                  "No config.json that could be read: bare.", "No list of artifacts was kept."):  # fmt: skip
        assert words in text, words
    built(small(tmp_path / "empty"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "", [], 0.0, -1.0])
def test_no_value_breaks_it(tmp_path, value):
    names = ("loss", "ce", "eval/ce", "eval/ce/wiki", "kl", "soft", "hard", "learning_rate", "grad_norm", "imbalance",
             "imbalance/0", "tokens", "tokens_per_second", "data_wait", "mfu")  # fmt: skip
    record = {"step": 2} | dict.fromkeys(names, value)
    good = {"step": 1} | dict.fromkeys(names, 1.0)
    every = small(tmp_path / "every", record, {**record, "step": 3, "expert_share": value})
    built(every)
    some = small(tmp_path / "some", good, record, {**good, "step": 3, "expert_share": [[value, 0.5], [0.5, 0.5]]})
    built(some, every, small(tmp_path / "one", good))


def test_losses_that_are_not_finite_are_counted(tmp_path):
    records = [{"step": i, "loss": math.nan if i in (3, 5) else 4.0 - i / 10, "ce": 3.0} for i in range(1, 9)]
    assert "2 recorded losses are not finite, the first at step 3." in built(small(tmp_path / "run", *records)).text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[1, null]", '{"learners": {}}', '[{"text": null}]'])
def test_broken_neighbours_are_left_out(tmp_path, content):
    run = small(tmp_path / "run", {"step": 1, "loss": 2.0, "ce": 2.0})
    for name in ("config.json", "samples.json", "artifacts.json", "data.json"):
        (run / name).write_text(content)
    built(run)


def test_a_line_cut_off_is_left_out(tmp_path):
    run = small(tmp_path / "run", {"step": 1, "loss": 2.0, "ce": 2.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert "for 1 step." in built(run).text


def test_text_is_escaped(tmp_path):
    evil = "<b onclick='x'>&\"$_\\"
    run = small(tmp_path / "a<b>&", {"step": 1, "loss": 2.0, "eval/ce": 2.0, f"eval/ce/{evil}": 2.0})
    (run / "samples.json").write_text(json.dumps([{"learner": evil, "prompt": evil, "text": evil + "</section>"}]))
    (run / "artifacts.json").write_text(json.dumps([{"what": evil, "from": evil, "where": evil, "note": evil}]))
    page = built(run)
    assert page.counts["b"] == 1  # the prompt's own
    assert page.text.count(evil) == 1 + 2 + 4 and "a<b>&" in page.text


def test_text_of_the_data_is_escaped(tmp_path):
    run = small(tmp_path / "run", {"step": 1, "loss": 2.0})
    contents(run, "<i>$\\frac$\u202e", "<b>x</b>\x1b[31m\u202e</section>")
    page = built(run)
    assert not {"b", "i"} & set(page.counts) and not set(page.text) & set("\x1b\u202e")
    assert r"<b>x</b>\x1b[31m\u202e</section>" in page.text


def test_runs_that_read_the_same_share_a_part(tmp_path):
    folders = [small(tmp_path / name, {"step": 1, "loss": 2.0}) for name in ("one", "two", "three")]
    for folder, text in zip(folders, ("a river", "a river", "a brook"), strict=True):
        contents(folder, "wiki", text)
    page = built(*folders)
    assert "one, two: The batches" in page.text and "three: The batches" in page.text
    assert page.text.count("a river") == page.text.count("a brook") == 1


def test_a_folder_without_records_names_the_nearest(runs):
    root = Path(runs[0]).parent
    for given, nearest in (("codistil-tiny", "codistill-tiny"), ("ce-olny", "ce-only"), ("", ".*")):
        with pytest.raises(ValueError, match=rf"no metrics\.jsonl in .*; the nearest run is .*/{nearest}$"):
            report.load([str(root / given)])


def test_long_and_many_stay_below_two_megabytes(tmp_path, runs):
    big = labels_alone(tmp_path / "big")
    lines = rows(big) * 100
    (big / "metrics.jsonl").write_text("".join(json.dumps(r | {"step": i}) + "\n" for i, r in enumerate(lines, 1)))
    built(*runs, big)


def test_one_picture_for_a_readme(runs):
    assert report.figure(report.load(list(runs))).startswith(b"\x89PNG\r\n")


def test_smoothing_keeps_lines_and_gaps():
    line = np.linspace(5, 3, 600)
    inside = slice(30, -30)
    np.testing.assert_allclose(figures.smoothed(line)[inside], line[inside], rtol=1e-12)
    gap = np.where(np.arange(600) % 7 == 0, np.nan, 2.0)
    np.testing.assert_allclose(figures.smoothed(gap), gap, rtol=1e-12)
    assert np.isnan(figures.smoothed(np.full(600, np.nan))).all()
