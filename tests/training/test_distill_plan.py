"""Where a teacher may stand: work by hand, and money that says the same as adding it up run by run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs import find
from training import distill_plan
from training.distill_plan import FORMATS, MONTH, PLACEMENTS, Rates, Work
from training.flops import step_per_token

UNIT = Rates(chips=1, peak=1.0, mfu=1.0, chip_hour=3600.0, tb_month=1e12)
"""A FLOP a second, for 1 each; a byte kept for a month costs 1."""
SMALL = Work(body=100, head=10, taught=2, others=50, hidden=8)


def test_bytes_of_a_token_by_hand():
    """Ids of 18 bits, masses of 8 but for the largest, their range in 3 bytes, the rest in 4, three statistics in 6."""
    sizes = [form.token.itemsize for form in FORMATS.values()]
    assert sizes == [144 + 63 + 3 + 4 + 6, 108 + 31 + 3 + 4 + 6, 30 + 6] == [220, 152, 36]


def test_work_by_hand():
    assert SMALL.of("tap") == (330, 70)  # 3 (100 + 10), 50 + 2 * 10
    assert SMALL.of("frozen") == (100, 70)
    assert SMALL.of("slice") == SMALL.of("recorded") == (110, 50)
    assert SMALL.of("recorded", runs=2) == (55, 50)


@pytest.mark.parametrize("name", ["codistill:maverick_scout_from_behemoth", "codistill:tiny_cotrained",
                                  "codistill:tiny", "distill:scout_from_maverick"])  # fmt: skip
def test_a_runs_work_is_that_of_its_programs(name):
    cfg = find(name)
    of, programs = distill_plan.work(cfg), distill_plan.programs(cfg)
    for placement in ("tap", "frozen"):
        assert sum(of.of(placement)) == step_per_token(programs[placement])
    assert of.of("slice")[1] == step_per_token(programs["slice"])
    assert distill_plan.teacher_of(cfg) not in programs["slice"].learners
    assert {distill_plan.work(programs[placement]) for placement in ("tap", "frozen")} == {of}
    teacher = cfg.learners[distill_plan.teacher_of(cfg)].model
    assert (of.head, of.hidden) == (2 * teacher.embed_dim * teacher.vocab_size, teacher.embed_dim)
    assert of.taught == (1 if name.startswith("distill") else 2)


def test_money_by_hand():
    """A thousandth of a byte a token, recorded in 110 seconds a token, trained on in 50."""
    tokens = MONTH / 1000
    once, kept = distill_plan.recorded_cost(SMALL, UNIT, 0.001, tokens, runs=3)
    assert once == pytest.approx(110 * tokens)
    assert kept == pytest.approx(0.001 * tokens * (110 + 3 * 50) / 1000)
    assert distill_plan.live_cost(SMALL, UNIT, tokens, runs=3) == pytest.approx(3 * 120 * tokens)
    # 120 a token and run, against 110 and what keeping costs: 0.0001 (1.1 + 0.5 r) of it.
    assert distill_plan.runs_that_pay(SMALL, UNIT, 0.001, tokens) == 1
    assert distill_plan.runs_that_pay(replace_head(10, 1), UNIT, 0.001, tokens) == 2  # 110 against 110 and more


def replace_head(head: int, taught: int) -> Work:
    return SMALL._replace(head=head, taught=taught)


def cheaper(of: Work, rates: Rates, size: float, tokens: float, runs: int) -> bool:
    return sum(distill_plan.recorded_cost(of, rates, size, tokens, runs)) < distill_plan.live_cost(
        of, rates, tokens, runs
    )


@pytest.mark.parametrize("seed", range(40))
def test_recording_pays_from_there_on(seed):
    """What the formulas solve for is where adding up changes sides."""
    rng = np.random.default_rng(seed)
    F, H, B = (int(10 ** rng.uniform(*of)) for of in ((9, 12), (8, 10), (9, 12)))
    of = Work(F, H, int(rng.integers(1, 4)), B, 1024)
    rates = Rates(
        int(rng.integers(1, 5000)), 5e14, rng.uniform(0.1, 0.9), rng.uniform(0.5, 10), 10 ** rng.uniform(0, 4)
    )
    size, tokens = rng.choice([float(form.token.itemsize) for form in FORMATS.values()]), 10 ** rng.uniform(9, 14)
    first = distill_plan.runs_that_pay(of, rates, size, tokens)
    if first is None:
        assert not any(cheaper(of, rates, size, tokens, runs) for runs in (1, 2, 10, 1000, 10**6))
    else:
        assert cheaper(of, rates, size, tokens, first) and cheaper(of, rates, size, tokens, 10 * first)
        assert first == 1 or not cheaper(of, rates, size, tokens, first - 1)
    for runs in (1, 2, 5):
        limit = distill_plan.tokens_that_pay(of, rates, size, runs)
        assert not cheaper(of, rates, size, limit * 1.001 + 1, runs)
        assert not limit or cheaper(of, rates, size, limit * 0.999, runs)
    assert distill_plan.tokens_that_pay(of, rates, 2 * size, 2) == pytest.approx(
        distill_plan.tokens_that_pay(of, rates, size, 2) / 2
    )


def test_one_student_and_one_run_never_pay_for_keeping():
    """A frozen teacher costs one student as much as recording does; storage comes on top."""
    of = replace_head(10, 1)
    assert distill_plan.tokens_that_pay(of, UNIT, 212.0, runs=1) == 0
    free = UNIT._replace(tb_month=1e-300)
    assert distill_plan.runs_that_pay(of, free, 212.0, 1e9) == 2


def test_the_real_sizes():
    """Scout from Maverick: 17B active a token, a head of 2 x 5,120 x 202,048, 220 TB for a trillion tokens."""
    cfg = find("distill:scout_from_maverick")
    made = distill_plan.compare(cfg, "h100:32x8", mfu=0.4, chip_hour=2.0, tb_month=20.0)
    assert list(made["placements"]) == list(PLACEMENTS) and not made["trains"]
    assert made["flops"]["head"] == 2_068_971_520 and made["hidden_bytes"] == 10_240
    tokens, teacher = made["tokens"], made["flops"]["body"]
    assert 1e12 <= tokens < 1e12 + 256 * 8192
    frozen, apart = made["placements"]["frozen"], made["placements"]["slice"]
    assert frozen["teacher_chip_hours"] == pytest.approx(tokens * teacher / (989e12 * 0.4) / 3600)
    assert made["formats"]["top-64"]["stored"] == 220 * tokens
    assert made["formats"]["top-64"]["runs_that_pay"] == 2
    assert apart["teacher_chips"] / (256 - apart["teacher_chips"]) == pytest.approx(
        apart["teacher_flops"] / apart["student_flops"]
    )
    assert all(one["program"]["fits"] and one["program"]["mfu"] <= 1 for one in made["placements"].values())
    assert frozen["program"]["peak"] > apart["program"]["peak"]
    assert json.loads(json.dumps(made)) == made


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="one teacher, and pretrain:tiny has none"):
        distill_plan.compare(find("pretrain:tiny"), "v5p:2x2x1", 0.4, 2.0, 20.0)
    cfg = find("codistill:tiny_cotrained")
    maverick, scout = cfg.learners["maverick"], cfg.learners["scout"]
    chain = replace(scout.distillation, teacher="maverick")
    chained = cfg.learners | {"maverick": maverick, "scout": replace(scout, distillation=chain)}
    with pytest.raises(ValueError, match=r"has 2 \(behemoth, maverick\)"):
        distill_plan.work(replace(cfg, learners=chained))
    for name, value in (("mfu", 1.5), ("mfu", 0.0), ("chip_hour", -1.0), ("tb_month", math.nan), ("runs", 0)):
        assumed: dict[str, Any] = dict(mfu=0.4, chip_hour=2.0, tb_month=20.0, runs=2) | {name: value}
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be above 0"):
            distill_plan.compare(cfg, "v5p:2x2x1", **assumed)
