"""Does distillation help, which way of it, and what protects from a bad teacher? Many arms, paired over seeds.

    python -m tools.experiment --teacher           # the teacher alone, on forty times a student's tokens: half an hour
    python -m tools.experiment --seeds 5           # all else, and docs/experiments.md with its figure

For each seed all students of `configs/ablation.py` start from the same weights and read the same tokens in the same
order, several in one program. Labels alone are tried at three learning rates, of which the best on average counts; and
once more for as many steps as take a distilled student's FLOPs (its teacher's forward pass and its logits among them).
Runs that are complete are not run again. Differences are paired by seed, with the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

import configs
from configs import ablation
from data.batch import Batch
from data.loader import Corpus, TrainIterator
from launch.startup import cache_folder, open_corpus
from training.config import RunConfig

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % point of Student's t for n seeds (n - 1 degrees of freedom)."""
RATES = ("labels", "labels_slow", "labels_fast")
DOCS = epath.Path("docs/experiments.md")
BEGIN, END = "<!-- the experiment's results; tools/experiment.py writes them -->", "<!-- end of the results -->"
CORRUPTED = "code"
CORRUPTING_STEPS = 200

Results = dict[str, dict[str, list[float]]]
"""Held-out CE in nats by arm, and by "" for all tokens or the domain's name: of each seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T95))
    parser.add_argument("--teacher", action="store_true", help="make the teacher, and stop")
    args = parser.parse_args()
    folder = epath.Path(ablation.FOLDER)
    teacher = finish(replace(configs.find("pretrain:tiny_behemoth_long"), out=str(folder / "teacher")))
    if args.teacher:
        return
    shuffle(folder)
    corrupted = corrupt(folder)
    results: Results = {}
    for seed in range(args.seeds):
        record_targets(folder, seed)
        for preset in ablation.PRESETS:
            run = replace(preset(), out=str(folder / f"{preset.__name__}-{seed}"))
            add(results, finish(run, seed))
    best = {student: tuned(results, student) for student in ("scout", "maverick")}
    for seed in range(args.seeds):
        add(results, finish(replace(longer(best["scout"]), out=str(folder / f"longer-{seed}")), seed), "scout-longer")
    made = dict(results=results, best=best, teacher=held_out(teacher, ""), corrupted=held_out(corrupted, ""))
    (folder / "results.json").write_text(json.dumps(made, indent=1) + "\n")
    write(made)


# --- Teachers and their targets


def shuffle(folder: epath.Path) -> None:
    """The teacher with its vocabulary's columns in another order: as sure as before, of other tokens."""
    if (folder / "shuffled" / "config.json").exists():
        return
    import jax

    from training.checkpoint import Checkpoints, load_config
    from training.mesh import make_mesh
    from training.record import run_record, write_config
    from training.state import abstract_state

    cfg = replace(load_config(folder / "teacher"), out=str(folder / "shuffled"))
    with Checkpoints(folder / "teacher") as source:
        step = source.find()
        state, place = source.restore(step, abstract_state(cfg, make_mesh(cfg.mesh)))
        order = np.random.default_rng(0).permutation(cfg.learners["behemoth"].model.vocab_size)
        unembedding: Any = state.learners["behemoth"].params["unembedding"]
        kernel = unembedding["kernel_DV"]
        unembedding["kernel_DV"] = kernel.replace(jax.device_put(kernel.get_value()[:, order]))
        tokenizer = open_corpus(cfg).tokenizer
        with Checkpoints(folder / "shuffled", 1) as target:
            target.save(step, state, place, run_record(cfg, tokenizer.hash))
    tokenizer.save(epath.Path(cfg.out))
    write_config(epath.Path(cfg.out), cfg)  # last: what is complete has it


def corrupt(folder: epath.Path) -> dict[str, float]:
    """The teacher after some steps in which one domain's documents had other labels: it reads code as before, and is
    sure of what never follows."""
    cfg = configs.find("pretrain:tiny_behemoth_long")
    learner = cfg.learners["behemoth"]
    assert learner.optimizer
    optimizer = replace(learner.optimizer, learning_rate=1e-3, warmup=10)
    learner = replace(learner, init=f"run:{folder / 'teacher'}", optimizer=optimizer)
    data = replace(cfg.data, tokenizer=str(folder / "teacher" / "tokenizer.model"))
    train = replace(cfg.train, steps=CORRUPTING_STEPS, eval_every=CORRUPTING_STEPS, checkpoint_every=CORRUPTING_STEPS)
    cfg = replace(cfg, learners={"behemoth": learner}, data=data, train=train, out=str(folder / "corrupted"))
    return finish(cfg, corpus=Mislabelled.open(cfg.data, cache_folder()))


class Mislabelled(Corpus):
    """Training batches in which each label of one domain is another token, always the same for the same one; tokens
    and held-out rows are as they were."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return _OtherLabels(super().train(*args, **kwargs), self.domains.index(CORRUPTED), self.tokenizer.vocab_size)


class _OtherLabels:
    def __init__(self, stream: TrainIterator, domain: int, vocabulary: int):
        self._stream, self._domain = stream, domain
        self._other = np.random.default_rng(0).permutation(vocabulary).astype(np.int32)
        self.get_state, self.close = stream.get_state, stream.close

    def __next__(self) -> Batch:
        rows = next(self._stream)
        return rows._replace(labels=np.where(rows.domain == self._domain, self._other[rows.labels], rows.labels))


def record_targets(folder: epath.Path, seed: int) -> None:
    """The teacher's sparse targets of what the seed's students read; what is there already is passed over."""
    from training.target_record import Form
    from training.teach import teach

    if (folder / f"placement-{seed}" / "config.json").exists():
        return
    cfg = ablation.weighting()
    cfg = replace(cfg, train=replace(cfg.train, seed=seed))
    teach(cfg, open_corpus(cfg), folder / "stratified", Form("stratified", 8, 4), learner="behemoth")


# --- Runs


def longer(arm: str) -> RunConfig:
    """Labels alone, for as many steps as have the FLOPs of `constant` with its teacher."""
    from training.flops import step_per_token

    cfg, distilled = ablation.labels(), ablation.weighting()
    alone = replace(cfg, name="ablation:longer", learners={arm: cfg.learners[arm]})
    taught = replace(distilled, learners={name: distilled.learners[name] for name in ("behemoth", "scout-constant")})
    steps = round(cfg.train.steps * step_per_token(taught) / step_per_token(alone))
    train = replace(cfg.train, steps=steps, eval_every=steps, checkpoint_every=steps)
    return replace(alone, train=train)


def finish(cfg: RunConfig, seed: int | None = None, corpus: Corpus | None = None) -> dict[str, Any]:
    """The last record of the run, of that seed, run to its end."""
    from training.loop import train

    if seed is not None:
        cfg = replace(cfg, train=replace(cfg.train, seed=seed))
    summary = train(cfg, corpus or open_corpus(cfg))
    if not summary["complete"]:
        raise SystemExit(f"stopped in {summary['folder']}; the same command goes on from there")
    return summary["metrics"]


def held_out(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """CE of all tokens, under "", and by domain."""
    start = f"{prefix}eval/ce"
    return {k.removeprefix(start).removeprefix("/"): v for k, v in record.items() if f"{k}/".startswith(f"{start}/")}


def add(results: Results, record: Mapping[str, Any], alone: str = "") -> None:
    """The held-out losses of a run of one seed; `alone` names the arm of a run with one learner."""
    prefixes = [""] if alone else [key.removesuffix("eval/ce") for key in record if key.endswith("/eval/ce")]
    for prefix in prefixes:
        for domain, value in held_out(record, prefix).items():
            results.setdefault(alone or prefix.removesuffix("/"), {}).setdefault(domain, []).append(value)


def tuned(results: Results, student: str) -> str:
    """The arm of labels alone with the rate that is best on average."""
    arms = [f"{student}-{name}" for name in RATES if f"{student}-{name}" in results]
    return min(arms, key=lambda arm: statistics.mean(results[arm][""]))


# --- What comes of it


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over seeds, and half of its 95 % interval."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(differences), T95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5


def table(made: Mapping[str, Any]) -> list[str]:
    results, lines = (
        made["results"],
        ["| arm | held out | less than labels alone | on code | on prose |", "|---|---|---|---|---|"],
    )
    for arm, by_domain in results.items():
        student = arm.partition("-")[0]
        if student not in made["best"]:
            continue
        base = results[made["best"][student]]
        cells = [f"{statistics.mean(by_domain['']):.4f}"]
        for domain in ("", "code", "prose"):
            mean, half = paired(by_domain[domain], base[domain])
            cells.append("—" if arm == made["best"][student] else f"{mean:+.4f} ± {half:.4f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def verdicts(made: Mapping[str, Any]) -> list[str]:
    results, best = made["results"], made["best"]

    def line(what: str, a: str, b: str, passes: str, domain: str = "") -> str:
        mean, half = paired(results[a][domain], results[b][domain])
        holds = {"below": mean + half < 0, "above": mean - half > 0, "goal": mean + half < 0 and mean <= -0.02}[passes]
        return f"* {what}: {mean:+.4f} ± {half:.4f} nats. **{'Yes' if holds else 'No'}.**"

    base = best["scout"]
    return [
        line("Distilled Scout against labels alone at its best rate, at most −0.02 with the interval below 0",
             "scout-constant", base, "goal"),
        line("Distilled Maverick, likewise", "maverick-constant", best["maverick"], "goal"),
        line("Against labels alone with the same FLOPs, below 0", "scout-constant", "scout-longer", "below"),
        line("Control: a shuffled teacher hurts", "scout-shuffled", base, "above"),
        line("Control: a teacher corrupted on code hurts there", "scout-corrupted", base, "above", "code"),
        line("The gate protects from it on code", "scout-corrupted_competence", "scout-corrupted", "below", "code"),
        line("The gate beats a constant weight with a sound teacher", "scout-competence", "scout-constant", "below"),
        line("Gradient-norm balancing beats a constant weight", "scout-gradient_norm", "scout-constant", "below"),
        line("Recorded stratified targets cost something, above 0", "scout-stratified", "scout-constant", "above"),
        line("The gate beats a constant weight with a teacher as young as the student", "scout-young_competence",
             "scout-young", "below"),
    ]  # fmt: skip


def write(made: Mapping[str, Any]) -> None:
    """The results into docs/experiments.md, between its markers, and the figure beside it."""
    seeds = len(next(iter(made["results"].values()))[""])
    teacher, corrupted = made["teacher"], made["corrupted"]
    text = "\n".join([
        BEGIN, "", f"{seeds} seeds. The teacher, held out: {teacher['']:.4f} (code {teacher['code']:.4f}, prose "
        f"{teacher['prose']:.4f}). The corrupted one: code "
        f"{corrupted['code']:.4f}, prose {corrupted['prose']:.4f}. Best rates of labels alone: "
        f"{', '.join(made['best'].values())}.", "",
        *verdicts(made), "", "![every arm against labels alone](experiments.png)", "",
        "Held-out loss in nats a token, mean over seeds; differences to labels alone at the best rate, paired by seed, "
        "with the 95 % interval.", "", *table(made), "", END,
    ])  # fmt: skip
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    DOCS.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
    draw(made, DOCS.with_suffix(".png"))
    print(text)


def draw(made: Mapping[str, Any], file: epath.Path) -> None:
    """A dot and its interval for each arm."""
    import matplotlib
    from matplotlib.figure import Figure

    from training.figures import STYLE, color

    results = made["results"]
    arms = [a for a in results if a.partition("-")[0] in made["best"] and a not in made["best"].values()]
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(7, 0.9 + 0.26 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for row, arm in enumerate(reversed(arms)):
            student = arm.partition("-")[0]
            mean, half = paired(results[arm][""], results[made["best"][student]][""])
            axes.errorbar(mean, row, xerr=half, fmt="o", capsize=3, color=color(0 if student == "scout" else 1))
        axes.set_yticks(range(len(arms)), list(reversed(arms)))
        axes.axvline(0, color="#9a9a94", linewidth=1)
        axes.set_xlabel("held-out loss less that of labels alone, nats a token (95 %)")
        figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
