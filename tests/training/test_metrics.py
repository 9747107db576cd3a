"""What a run reports: losses recomputed by hand, FLOPs by hand, and a file that tells one story."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from training.chips import peak_flops
from training.config import Distillation
from training.flops import step_per_token
from training.mesh import make_mesh
from training.metrics import (
    Console,
    Throughput,
    Writers,
    measured,
    read,
    scalars,
)
from training.objectives import Sums


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU7x", 1153.5),
     ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
     ("cpu", None)],
)  # fmt: skip
def test_peak(kind, tflops):
    assert peak_flops(kind) == (tflops and tflops * 1e12)


def test_throughput(make_run, monkeypatch):
    now = 100.0
    monkeypatch.setattr("training.metrics.time.perf_counter", lambda: now)
    cfg = make_run()
    meter = Throughput(cfg, make_mesh(cfg.mesh))
    assert meter.report() == {}
    meter.add(300.0, 0.5)
    meter.add(500.0, 0.5)
    now = 104.0
    flops = 200 * step_per_token(cfg) / 8
    expected = dict(tokens_per_second=200.0, seconds_per_step=2.0, data_wait=0.25, tflops=flops / 1e12)
    assert meter.report() == pytest.approx(expected)  # no mfu: a CPU's peak is not known
    meter.peak = 4 * flops
    meter.add(800.0, 0.0)
    now = 108.0
    assert meter.report()["mfu"] == pytest.approx(0.25)


def step_metrics(layers: int):
    load = np.full((layers, 4), 5.0)
    load[1] = [16, 4, 0, 0]
    tokens = np.float32([15, 0, 5])
    sums = Sums(np.float32(20), tokens, {"ce": np.float32([30, 0, 20])}, None, np.float32(40), np.float32(60), load,
                np.zeros(layers))  # fmt: skip
    rest = dict(grad_norm=1.5, learning_rate=1e-3)
    return dict(sums=sums, **{name: np.float32(value) for name, value in rest.items()})


def test_scalars_of_one_learner(make_run):
    cfg = make_run()
    out = scalars({"scout": step_metrics(2)}, cfg, ("even", "none", "odd"))
    table = out.pop("expert_share")
    assert table == [[0.25] * 4, [0.8, 0.2, 0.0, 0.0]]
    assert out == pytest.approx(
        {"loss": 2.5 + 0.01 * 2 + 0.001 * 3, "ce": 2.5, "ce/even": 2.0, "ce/odd": 4.0, "balance": 2.0, "z": 3.0,
         "grad_norm": 1.5, "learning_rate": 1e-3, "tokens": 20.0, "imbalance": 3.2,
         "imbalance/1": 1.0, "imbalance/3": 3.2}  # a Maverick's odd layers are MoE
    )  # fmt: skip


def test_scalars_of_a_student(make_run):
    """Of 20 tokens 12 have a target: 10 of the first domain and 2 of the last."""
    cfg = make_run()
    student = replace(cfg.learners["scout"], distillation=Distillation("teacher", temperature=2.0))
    cfg = replace(cfg, learners={"teacher": replace(cfg.learners["scout"], optimizer=None), "student": student})
    metrics = step_metrics(2)
    means = dict(kl=(0.3, 0, 0.9), reverse_kl=(0.2, 0, 0.8), divergence=(0.1, 0, 0.7), teacher_ce=(1.5, 0, 3.0),
                 teacher_entropy=(1.4, 0, 2.9), agreement=(0.5, 0, 1.0), teacher_better=(0.6, 0, 0.5),
                 soft=(0.75, 0, 0.25), hard_norm=(0.8, 0, 0.4), soft_norm=(0.4, 0, 0.2), norm_product=(0.2, 0, 0.0),
                 hard_square=(0.64, 0, 0.16), soft_square=(0.16, 0, 0.04), tokens=(1, 0, 1))  # fmt: skip
    taught = {name: np.float32([10, 0, 2]) * np.float32(mean) for name, mean in means.items()}
    taught |= {"weighted": np.float32([25, 0, 7]), "hard": np.float32([7.5, 0, 5])}
    metrics["sums"].by_domain.update(taught)
    found = scalars({"student": metrics}, cfg, ("even", "none", "odd"))
    out = {name.removeprefix("student/"): x for name, x in found.items()}
    assert out["loss"] == pytest.approx(32 / 20 + 0.01 * 2 + 0.001 * 3)
    assert (out["kl"], out["kl/even"], out["kl/odd"]) == pytest.approx((0.4, 0.3, 0.9))
    assert (out["missing"], out["missing/even"], out["missing/odd"]) == pytest.approx((8 / 20, 5 / 15, 3 / 5))
    assert (out["hard"], out["hard/odd"], out["soft/odd"]) == pytest.approx((12.5 / 20, 1.0, 0.25))
    assert (out["norm_ratio"], out["norm_cosine/even"], out["norm_cosine/odd"]) == pytest.approx((0.5, 0.625, 0.0))
    assert out["norm_cosine"] == pytest.approx(2 / np.sqrt((6.4 + 0.32) * (1.6 + 0.08)))
    assert "kl/none" not in out and out["teacher_better"] == pytest.approx(7 / 12)


def test_calibration_error(make_run):
    """Two bins: of 4 tokens said to be right at 0.5 one is, of 6 at 0.9 all are."""
    metrics = step_metrics(2)
    table = np.zeros((3, 15, 3))
    table[0, 7], table[2, 13] = (4, 2.0, 1), (6, 5.4, 6)
    sums = metrics["sums"]._replace(calibration=table, domain_tokens=np.float32([4, 0, 6]))
    found = measured(sums, ("even", "none", "odd"))
    assert (found["ece"], found["ece/even"], found["ece/odd"]) == pytest.approx((0.16, 0.25, 0.1))


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    folder = epath.Path(tmp_path)
    writers = Writers(folder, 0)
    for step in (1, 2, 3):
        writers.write(step, {"loss": step / 3, "expert_share": [[1.0]]})
    writers.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')  # killed while writing
    assert [r["step"] for r in read(folder)] == [1, 2, 3]
    writers = Writers(folder, 2)
    writers.write(3, {"loss": 1.0})
    writers.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert records[0]["expert_share"] == [[1.0]] and list((tmp_path / "tensorboard").iterdir())
    Writers(folder, 0).close()
    assert read(folder) == []


def test_a_full_disk_ends_the_writing_in_a_line(tmp_path, monkeypatch):
    """At once, whichever file meets it, and closing returns."""
    writers = Writers(epath.Path(tmp_path), 0)
    writers.write(1, {"loss": 1.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.metrics.EventsWriter.write_event", full)
        with pytest.raises(OSError, match=r"the record of step 2 in .* could not be written: No space left"):
            writers.write(2, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(writers._board, "flush", full)
        with pytest.raises(OSError, match=r"records in .* could not be written: No space left"):
            writers.close()
    assert [r["step"] for r in read(epath.Path(tmp_path))] == [1, 2]


def test_tensorboard_reads_what_was_written(tmp_path):
    """Steps after the restored one are purged."""
    for start in (0, 2):
        writers = Writers(epath.Path(tmp_path), start)
        for step in range(start + 1, 4):
            writers.write(step, {"loss": step / 2, "table": [[1.0]]})
        writers.close()
    events = [
        event_pb2.Event.FromString(record)
        for file in sorted((tmp_path / "tensorboard").iterdir())
        for record in records_of(file.read_bytes())
    ]
    losses = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5)]
    assert [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START] == [1, 3]
    assert all(e.wall_time for e in events)


def records_of(raw: bytes) -> list[bytes]:
    """Of a file of TensorFlow's records: length, its checksum, bytes, their checksum."""
    found = []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        found.append(raw[12 : 12 + size])
        raw = raw[16 + size :]
    return found


def test_plain_lines(make_run):
    lines = []
    console = Console(make_run(steps=100), 0, lines.append)
    console.report(10, {"loss": 2.0, "tokens_per_second": 1e5, "tflops": 12.0, "mfu": 0.5, "seconds_per_step": 2.0})
    console.report(20, {"loss": 1.0, "eval/ce": 3.0, "eval/ce/odd": 4.0})
    console.close()
    assert lines == [
        "step 10/100  loss 2.0000  100,000 tokens/s  MFU 50.0%  0:03:00 left",
        "step 20/100  loss 1.0000",
        "step 20/100  held out: ce 3.0000  ce/odd 4.0000",
    ]
