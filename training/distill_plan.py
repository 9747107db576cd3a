"""What a teacher costs where it may stand: in the students' program or apart from it, live or recorded.

Per token of a row, with F the FLOPs of the teacher's forward pass without its head and H those of its head (2 U V,
`training/flops.py`), n students taught, B the FLOPs of training all learners but the teacher on labels alone, b the
bytes of a token's sparse targets (`training/target_record.py`), and c U the bytes of its hidden states:

| placement | teacher | students | moved |
|---|---|---|---|
| tap: the teacher trains, too, and its own forward pass teaches | 3 (F + H) | B + n H | c U, within the program |
| frozen, in the students' program | F | B + n H | c U, within the program |
| slice: frozen, on chips of its own, which hand on sparse targets | F + H | B | b, over the network |
| recorded: the same, once, for r runs over the same tokens | (F + H) / r | B | b / r written, b read |

In one program each student multiplies with the teacher's head itself; one whose targets are sparse does not, and
looks up its own log-probabilities at a few ids, which counts as nothing. Sparse targets go once to a program, however
many students are in it. What the formats do to the loss is not in here: those of draws are unbiased, the others not.

**Money.** A FLOP costs q = price of a chip-hour / (3600 peak MFU), a byte kept for a month p. Of N tokens, over r runs
of students one after the other, behind a pass that records them:

    live       r N q (F + n H)
    recorded     N q (F + H) + N b p N (x + r y)

x and y are the months that the chips take to record one token and to train the students on it: every target is kept
from the first one's recording to the end of the last run. Recording pays from

    r > (q (F + H) + b p N x) / (q (F + n H) - b p N y)

runs on, never where the denominator is not positive: storage costs by the square of N, so that r runs pay only up to

    N < (r q (F + n H) - q (F + H)) / (b p (x + r y))

A pass over the tokens by a run of several epochs counts as a run. Reading and writing are taken to cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from training import chips
from training.config import Distillation, OptimizerConfig, RunConfig
from training.flops import forward, of_step, vision
from training.plan import plan
from training.target_record import Form

PLACEMENTS = ("tap", "frozen", "slice", "recorded")
MONTH = 365.25 / 12 * 86400
TB = 1e12


FORMATS = {
    "top-64": Form("topk", 64, 0),
    "top-32 + 16 draws": Form("stratified", 32, 16),
    "12 draws": Form("sample", 0, 12),
}
"""The first keeps the largest entries, the last draws from the whole distribution, the second from what its largest
leave; b is what a store's record takes of a token."""


class Work(NamedTuple):
    """FLOPs of a token."""

    body: int  # F: the teacher's forward pass without its head
    head: int  # H: its head
    taught: int  # n: students that learn from it
    others: int  # B: training everything but the teacher, on labels alone
    hidden: int  # U, the teacher's width

    def of(self, placement: str, runs: int = 1) -> tuple[float, float]:
        """(teacher, students) in one of PLACEMENTS, for each token of each of `runs` runs over the same tokens."""
        once = self.body + self.head
        teacher = dict(tap=3 * once, frozen=self.body, slice=once, recorded=once / runs)[placement]
        students = self.others + (self.taught * self.head if placement in ("tap", "frozen") else 0)
        return float(teacher), float(students)


class Rates(NamedTuple):
    """What is assumed, and how much of it there is."""

    chips: int
    peak: float  # FLOP/s of a chip
    mfu: float
    chip_hour: float  # money
    tb_month: float  # money

    @property
    def flop(self) -> float:
        """q, money."""
        return self.chip_hour / 3600 / (self.peak * self.mfu)

    @property
    def byte_month(self) -> float:
        """p, money."""
        return self.tb_month / TB

    def seconds(self, flops: float) -> float:
        """All chips together."""
        return flops / (self.chips * self.peak * self.mfu)

    def chip_hours(self, flops: float) -> float:
        return flops / (self.peak * self.mfu) / 3600


def teacher_of(cfg: RunConfig) -> str:
    """The one learner that teaches; ValueError where there is none or more than one."""
    teachers = list(
        dict.fromkeys(one.distillation.teacher for one in cfg.learners.values() if one.distillation.teacher)
    )
    if len(teachers) != 1:
        found = f"{len(teachers)} ({', '.join(teachers)})" if teachers else "none"
        raise ValueError(f"plan distill takes a run with one teacher, and {cfg.name} has {found}")
    return teachers[0]


def work(cfg: RunConfig) -> Work:
    """Of a run with one teacher, which may train or not: what placements differ in is `Work.of`."""
    name = teacher_of(cfg)
    teacher, T = cfg.learners[name].model, cfg.train.seq_len
    parts = forward(teacher, T)
    head = parts.pop("head")
    taught = sum(one.distillation.teacher == name for one in cfg.learners.values())
    others = sum(flops for (learner, _), flops in of_step(cfg).items() if learner != name) - taught * head
    body = sum(parts.values()) + (vision(teacher, "none") * cfg.train.tiles / T if cfg.images else 0)
    return Work(round(body), head, taught, round(others), teacher.embed_dim)


def stored_months(of: Work, rates: Rates, tokens: float, runs: int) -> float:
    """N (x + r y): from the first target recorded to the end of the last run."""
    recording, training = of.body + of.head, of.others
    return rates.seconds(tokens * (recording + runs * training)) / MONTH


def live_cost(of: Work, rates: Rates, tokens: float, runs: int = 1) -> float:
    """Money that a frozen teacher in the students' program takes beside the students."""
    return runs * tokens * rates.flop * (of.body + of.taught * of.head)


def recorded_cost(of: Work, rates: Rates, size: float, tokens: float, runs: int = 1) -> tuple[float, float]:
    """Money for (recording once, keeping `size` bytes a token for all runs)."""
    kept = tokens * size * rates.byte_month * stored_months(of, rates, tokens, runs)
    return tokens * rates.flop * (of.body + of.head), kept


def runs_that_pay(of: Work, rates: Rates, size: float, tokens: float) -> int | None:
    """The least number of runs over the same tokens from which recording is cheaper than a live teacher, if any."""
    kept = tokens * size * rates.byte_month
    once = tokens * rates.flop * (of.body + of.head) + kept * stored_months(of, rates, tokens, 0)
    each = live_cost(of, rates, tokens) - kept * rates.seconds(tokens * of.others) / MONTH
    return math.floor(once / each) + 1 if each > 0 else None


def tokens_that_pay(of: Work, rates: Rates, size: float, runs: int) -> float:
    """The most tokens of which recording for so many runs is cheaper than a live teacher; 0 where it never is."""
    saved = live_cost(of, rates, 1.0, runs) - rates.flop * (of.body + of.head)
    return max(0.0, saved / (size * rates.byte_month * stored_months(of, rates, 1.0, runs)))


# --- A run's placements side by side


def programs(cfg: RunConfig) -> dict[str, RunConfig]:
    """The students' program under each placement; `slice` and `recorded` have the same one.

    A frozen teacher that is to train does so as its first student does, if it does not say how.
    """
    name = teacher_of(cfg)
    teacher, others = cfg.learners[name], {other: one for other, one in cfg.learners.items() if other != name}
    like = next((one for one in others.values() if one.optimizer), teacher)
    trained = teacher if teacher.optimizer else replace(teacher, optimizer=like.optimizer or OptimizerConfig(),
                                                        remat=like.remat)  # fmt: skip
    apart = {
        other: replace(one, distillation=Distillation()) if one.distillation.teacher == name else one
        for other, one in others.items()
    }
    return dict(
        tap=replace(cfg, learners={name: trained} | others),
        frozen=replace(cfg, learners={name: replace(teacher, optimizer=None)} | others),
        slice=replace(cfg, learners=apart),
    )


def compare(
    cfg: RunConfig, topology: str, mfu: float, chip_hour: float, tb_month: float, runs: int = 2
) -> dict[str, Any]:
    """All placements on the run's devices, over its tokens, as plain data; money in the unit of the prices."""
    for what, value in (("--mfu", mfu), ("--chip-hour", chip_hour), ("--tb-month", tb_month), ("--runs", runs)):
        if not value > 0 or (what == "--mfu" and value > 1):
            raise ValueError(f"{what} must be above 0{', at most 1' * (what == '--mfu')}, not {value:g}")
    of, plans = work(cfg), {name: plan(one, topology, fast=True) for name, one in programs(cfg).items()}
    chip = chips.CHIPS[topology.partition(":")[0]]
    rates = Rates(plans["slice"]["devices"] // chip.devices, chip.bf16, mfu, chip_hour, tb_month)
    tokens = float(plans["slice"]["run"]["tokens"])
    name = teacher_of(cfg)
    return dict(
        preset=cfg.name, topology=topology, chips=rates.chips, tokens=tokens, teacher=name,
        trains=cfg.learners[name].optimizer is not None,
        students=[other for other, one in cfg.learners.items() if one.distillation.teacher == name],
        assumed=rates._asdict(),
        flops=of._asdict(),
        placements={name: _placement(name, of, rates, tokens, plans.get(name, plans["slice"])) for name in PLACEMENTS},
        formats={name: _format(of, rates, float(form.token.itemsize), tokens, runs) for name, form in FORMATS.items()},
        runs=runs, live_cost=live_cost(of, rates, tokens), hidden_bytes=2 * of.hidden,
    )  # fmt: skip


def _placement(name: str, of: Work, rates: Rates, tokens: float, made: dict[str, Any]) -> dict[str, Any]:
    """Of one run. Where the teacher has chips of its own they are as many of all as its share of the FLOPs."""
    teacher, students = of.of(name)
    here = students if name in ("slice", "recorded") else teacher + students
    memory, roof = made["memory"], made["roofline"]
    return dict(
        teacher_flops=teacher, student_flops=students,
        teacher_chip_hours=rates.chip_hours(tokens * teacher), student_chip_hours=rates.chip_hours(tokens * students),
        tokens_per_second=1 / rates.seconds(teacher + students),
        teacher_chips=rates.chips * teacher / (teacher + students) if name == "slice" else 0.0,
        program=dict(flops=here, step=roof["step"], bound=roof["bound"], mfu=roof["mfu"], peak=memory["peak"],
                     hbm=memory["hbm"], fits=memory["fits"]),
    )  # fmt: skip


def _format(of: Work, rates: Rates, size: float, tokens: float, runs: int) -> dict[str, Any]:
    once, kept = recorded_cost(of, rates, size, tokens)
    return dict(
        bytes=size, stored=size * tokens, months=stored_months(of, rates, tokens, 1), once=once, kept=kept,
        runs_that_pay=runs_that_pay(of, rates, size, tokens),
        tokens_that_pay=tokens_that_pay(of, rates, size, runs),
        read_per_second=size / rates.seconds(float(of.others)),
    )  # fmt: skip
