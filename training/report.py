"""A run, or several side by side, as one HTML file: what was learned, how it went, what was made.

The file needs nothing but itself: figures are drawn into it, no script, no font, no address. What a run does not have
is left out with a line that says so.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama4_jax.config import ModelConfig, Rope, VisionConfig
from training import figures
from training.figures import Line
from training.page import card, figure_card, note, page, section, short, table
from training.report_data import data
from training.report_time import time_spent
from training.runs import Entry, Run, entries, load

SHOWN_SAMPLES, SHOWN_CHARACTERS = 24, 2000
ALL = "all"  # the row of a mean over every domain


# --- The report


def write(folders: Sequence[str], out: str = "") -> epath.Path:
    """Write the report of these runs to `out` (default: report.html in the first one's folder); returns its path."""
    runs = load(folders)
    file = epath.Path(out) if out else runs[0].folder / "report.html"
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no folder {file.parent} to write {file.name} into")
    file.write_text(build(runs))
    return file


def build(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    all_of_them = entries(runs)
    title = " and ".join([", ".join(run.name for run in runs[:-1]), runs[-1].name]) if len(runs) > 1 else runs[0].name
    parts = [_held_out, _training, _data, _distillation, _experts, _optimisation, _throughput, _time, _samples, _models,
             _made]  # fmt: skip
    return page(title, _summary(all_of_them), [part(all_of_them) for part in parts])


def curves(found: Sequence[Entry]) -> list[str]:
    """The sections about what was learned so far, for a run that is under way."""
    return [_training(found), _held_out(found), _experts(found)]


def lanes(runs: Sequence[Run]) -> str:
    """The section about what was read."""
    return data(runs)


def figure(runs: Sequence[Run]) -> bytes:
    """One PNG for a README: the loss of teacher and students over the steps, and on held-out documents."""
    found = entries(runs)
    lines, ylabel = _losses(found)
    if not lines:
        raise ValueError(f"no losses to draw in {', '.join(str(run.folder) for run in runs)}")
    judged, values = _final(found)
    return figures.overview(lines, ylabel, values, [e.label for e in judged], [e.index for e in judged])


def _summary(found: Sequence[Entry]) -> list[str]:
    """Sentences with the numbers that matter."""
    runs = list(dict.fromkeys(e.run for e in found))
    out = []
    for run in runs:
        trained = [name for name in run.learners if run.role(name) != "frozen teacher"]
        teachers = [t for t in dict.fromkeys(run.teacher(name) for name in trained) if t]
        taught = f", taught by {_listed(teachers)}," if teachers else ""
        of = f" of {run.train('steps'):,}" if run.train("steps") else ""
        tokens = _tokens(run)
        seen = f" and {short(tokens)} tokens{' each' * (len(trained) > 1)}" if math.isfinite(tokens) else ""
        out.append(
            f"{run.name} trained {_listed(trained)}{taught} for {run.step:,}{of} step{'s' * (run.step != 1)}{seen}."
        )
        ends = {name: run.last(name, "eval/ce") for name in run.learners}
        if parts := [f"{name} {loss:.3f}" for name, loss in ends.items() if math.isfinite(loss)]:
            out.append(f"Loss on held-out documents, in nats a token: {_listed(parts)}.")
    for e in found:
        first = _reference(e, found)
        ours, theirs = e.run.last(e.learner, "eval/ce"), first.run.last(first.learner, "eval/ce") if first else math.nan
        if first and math.isfinite(ours - theirs):
            how = "below" if ours < theirs else "above"
            out.append(f"{e.label} ends {abs(ours - theirs):.3f} nats {how} {first.label}.")
    return out


def _reference(entry: Entry, found: Sequence[Entry]) -> Entry | None:
    """The learner of the first run that this one is compared with: of the same name."""
    if entry.run is found[0].run:
        return None
    return next((e for e in found if e.run is found[0].run and e.learner == entry.learner), None)


def _tokens(run: Run) -> float:
    """Valid tokens that each learner saw, those before a fork included."""
    return run.last(next(iter(run.learners)), "tokens_seen")


def _staged(run: Run, of: Callable[[Mapping[str, Any]], str]) -> str:
    """What the run begins with, which is `of` no stage, and what its stages have otherwise."""
    later = [(stage["after"], of(stage)) for stage in run.config.get("stages") or ()]
    return "; ".join([of({}), *(f"after step {n:,} {text}" for n, text in later if text != of({}))])


def _rows(run: Run) -> str:
    return _staged(run, lambda s: " × ".join(str(s.get(x) or run.train(x) or "–") for x in ("batch", "seq_len")))


def _mesh(sizes: Mapping[str, int]) -> str:
    parts = [f"{name} {n}" for name, n in sizes.items() if n > 1]
    rest = [f"{name} over {'the remaining' if parts else 'all'} devices" for name, n in sizes.items() if n == -1]
    return ", ".join([*parts, *rest]) or "one device"


# --- Sections: each takes the learners of all runs and returns HTML


def _held_out(found: Sequence[Entry]) -> str:
    judged, final = _final(found)
    if not judged:
        return section("Held-out loss", note("No evaluation on held-out documents is recorded."))
    rows = []
    for i, e in enumerate(judged):
        first = _reference(e, found)
        place = judged.index(first) if first and first in judged else None
        cells = [_difference(v[i], None if place is None else v[place]) for v in final.values()]
        rows.append([_named(e), *cells])
    body = card(table(["learner", *map(html.escape, final)], rows), wide=True)
    lead = "Cross-entropy on documents that no learner trained on, in nats a token; lower is better."
    if any(_reference(e, found) for e in judged):
        lead += " Differences are to the learner of the same name in the first run; of one run each, they leave out "
        lead += "the spread over seeds."
    silent = [e.label for e in found if e not in judged]
    if silent:
        lead += f" Without an evaluation: {_listed(silent)}."
    if len({json.dumps(_vocabulary(e.run)) for e in judged}) > 1:
        lead += " The runs' tokenizers or documents differ, so that their nats a token do not compare."
    labels, indices = [e.label for e in judged], [e.index for e in judged]
    charts = figure_card(figures.dots(final, labels, indices, "nats a token"), "At the end, by domain.")
    names = {ALL: "eval/ce", **{name: f"eval/ce/{name}" for name in final if name != ALL}}
    groups = {name: _lines(judged, key) for name, key in names.items()}
    if max(len(line.x) for lines in groups.values() for line in lines) > 1:
        drawn = figures.panels({n: lines for n, lines in groups.items() if lines}, "nats a token")
        charts += figure_card(drawn, "Over the steps.")
    return section("Held-out loss", f"{note(lead)}{body}{charts}")


def _final(found: Sequence[Entry]) -> tuple[list[Entry], dict[str, list[float]]]:
    """Learners with an evaluation, and their last losses by domain, the mean over all first."""
    judged = [e for e in found if math.isfinite(e.run.last(e.learner, "eval/ce"))]
    domains = dict.fromkeys(domain for e in judged for domain in e.run.domains(e.learner))
    keys = {ALL: "eval/ce"} | {domain: f"eval/ce/{domain}" for domain in domains}
    return judged, {n: [e.run.last(e.learner, k) for e in judged] for n, k in keys.items()} if judged else {}


def _vocabulary(run: Run) -> Any:
    data = run.config.get("data", {})
    return [data.get(field) for field in ("tokenizer", "vocab_size", "sources", "heldout")]


def _losses(found: Sequence[Entry]) -> tuple[list[Line], str]:
    """Curves on the training documents: cross-entropy, which compares, else the loss that is minimised."""
    for key, name in (("ce", "cross-entropy, nats a token"), ("loss", "loss")):
        if lines := _lines(found, key):
            return lines, name
    return [], ""


def _training(found: Sequence[Entry]) -> str:
    lines, ylabel = _losses(found)
    if not lines:
        return section("Training loss", note("No losses are recorded."))
    lead = "On the documents of each step, smoothed over the faint values as recorded."
    frozen = [e.label for e in found if e.run.role(e.learner) == "frozen teacher"]
    lead += f" Frozen, so without a curve: {_listed(frozen)}." if frozen else ""
    charts = figure_card(figures.curves(lines, ylabel, smooth=True), f"Training: {ylabel}.")
    minimised = _lines([e for e in found if e.run.teacher(e.learner)], "loss")
    if minimised and ylabel != "loss":
        caption = "What the students minimise: labels, soft targets and router terms."
        charts += figure_card(figures.curves(minimised, "loss", smooth=True), caption)
    broken = []
    for e in found:
        steps, values = e.run.series(e.learner, "loss")
        if len(bad := steps[~np.isfinite(values)]):
            broken.append(f"{e.label}: {len(bad)} recorded losses are not finite, the first at step {bad[0]:,.0f}.")
    return section("Training loss", note(" ".join([lead, *broken])) + charts)


def _data(found: Sequence[Entry]) -> str:
    return data(list(dict.fromkeys(e.run for e in found)))


def _time(found: Sequence[Entry]) -> str:
    return time_spent(list(dict.fromkeys(e.run for e in found)))


def _distillation(found: Sequence[Entry]) -> str:
    students = [e for e in found if e.run.teacher(e.learner)]
    if not students:
        return section("Distillation", note("No learner has a teacher."))
    weights = []
    for e in students:
        start = f"{e.label}: " if len(students) > 1 else ""
        pair = (
            e.line("soft")._replace(label=f"{start}soft"),
            e.line("hard")._replace(label=f"{start}hard", dashed=True),
        )
        weights += [line for line in pair if np.isfinite(line.y).any()]
    if weights:
        caption = "Weights in the loss: of the soft targets, solid, and of the labels, dashed."
        charts = figure_card(figures.curves(weights, "weight"), caption)
    else:
        charts = note("The weights of labels and soft targets are not recorded.")
    if divergence := _lines(students, "kl"):
        drawn = figures.curves(divergence, "KL, nats a token", smooth=True)
        charts += figure_card(drawn, "KL(teacher ‖ student) on the training documents.")
    else:
        charts += note("The divergence from the teacher is not recorded.")
    for key, (label, caption) in TAUGHT.items():
        if lines := _lines(students, key):
            charts += figure_card(figures.curves(lines, label, smooth=True), caption)
    settings = ("teacher", "divergence", "schedule", "weighting", "soft", "temperature")
    rows = []
    for e in students:
        cfg = e.run.learners[e.learner]["distillation"]
        rows.append([_named(e), *(html.escape(str(cfg.get(x, "–"))) for x in settings)])
    heads = ["student", "teacher", "divergence", "schedule", "weighting", "peak soft weight", "temperature"]
    body = card(table(heads, rows), wide=True)
    return section("Distillation", body + charts + _by_domain(students))


TAUGHT = {
    "agreement": ("share of tokens", "Tokens of which student and teacher find the same one likeliest."),
    "teacher_better": ("share of tokens", "Tokens that the teacher predicts better than the student."),
    "norm_ratio": ("ratio", "Size of the soft targets' gradient over that of the labels', in the logits."),
}
LAST = {"ce": "CE", "teacher_ce": "teacher's CE", "kl": "KL(t ‖ s)", "reverse_kl": "KL(s ‖ t)", "entropy": "entropy",
        "teacher_entropy": "teacher's entropy", "agreement": "agreement", "ece": "calibration error",
        "teacher_better": "teacher better", "soft": "soft", "hard": "hard", "norm_ratio": "gradients' ratio",
        "norm_cosine": "gradients' cosine", "missing": "without target"}  # fmt: skip


def _by_domain(students: Sequence[Entry]) -> str:
    """The last training record of each student, per domain."""
    rows = []
    for e in students:
        for domain in (ALL, *e.run.domains(e.learner)):
            values = [e.run.last(e.learner, key if domain == ALL else f"{key}/{domain}") for key in LAST]
            if any(math.isfinite(value) for value in values):
                name = _named(e) if domain == ALL else ""
                cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
                rows.append([name, html.escape(domain), *cells])
    if not rows:
        return ""
    return card(table(["student", "domain", *LAST.values()], rows) + note(
        "Of the last recorded step: means over its tokens, losses in nats."), wide=True)  # fmt: skip


def _experts(found: Sequence[Entry]) -> str:
    charts = ""
    for e in found:
        share = e.run.key(e.learner, "expert_share")
        record = next((r for r in reversed(e.run.records) if r.get(share)), None)
        if record is None:
            continue
        try:
            loads = np.array(record[share], float)
        except (TypeError, ValueError):
            loads = np.zeros(0)
        if loads.ndim != 2 or not loads.size:
            continue
        start = e.run.key(e.learner, "imbalance/")
        layers = sorted(int(rest) for key in record if (rest := key.removeprefix(start)) != key and rest.isdigit())
        layers = layers if len(layers) == len(loads) else list(range(len(loads)))
        caption = f"{e.label}, step {record['step']:,}: load of each expert, 1 being an even share."
        charts += figure_card(figures.heat(loads, layers), caption)
    if not charts:
        return section("Expert load", note("No loads of experts are recorded."))
    if worst := _lines(found, "imbalance"):
        caption = "Busiest expert of the least balanced layer, as a multiple of the even share."
        charts += figure_card(figures.curves(worst, "imbalance", smooth=True), caption)
    return section("Expert load", charts)


def _optimisation(found: Sequence[Entry]) -> str:
    return _charts("Optimisation", found, {
        "learning_rate": ("learning rate", "Learning rate.", {}),
        "grad_norm": ("gradient norm", "Global gradient norm before clipping.", {"smooth": True, "log": True}),
    })  # fmt: skip


def _throughput(found: Sequence[Entry]) -> str:
    runs = list(dict.fromkeys(e.run for e in found))
    first = {e.run: e for e in reversed(found)}
    of_runs = [first[run]._replace(label=run.name) for run in runs]
    return _charts("Throughput", of_runs, {
        "tokens_per_second": ("tokens a second", "Tokens a second, over all devices.", {"smooth": True, "zero": True}),
        "data_wait": ("share of the time", "Share of the time spent waiting for data.", {"smooth": True, "zero": True}),
        "mfu": ("MFU", "Model FLOPs over the devices' peak.", {"smooth": True, "zero": True}),
    }, optional=("mfu",))  # fmt: skip


def _charts(title: str, found: Sequence[Entry], wanted: Mapping[str, tuple[str, str, dict[str, bool]]],
            optional: Iterable[str] = ()) -> str:  # fmt: skip
    body = ""
    for key, (ylabel, caption, how) in wanted.items():
        if lines := _lines(found, key):
            body += figure_card(figures.curves(lines, ylabel, **how), caption)
        elif key not in optional:
            body += note(f"Not recorded: {ylabel}.")
    return section(title, body)


def _samples(found: Sequence[Entry]) -> str:
    runs = list(dict.fromkeys(e.run for e in found))
    body = ""
    for run in runs:
        samples = [s for s in run.samples or [] if isinstance(s, dict)]
        for sample in samples[:SHOWN_SAMPLES]:
            prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
            text = text.removeprefix(prompt)
            text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
            who = " · ".join(filter(None, [run.name if len(runs) > 1 else "", str(sample.get("learner") or "")]))
            body += card(f'<p class="who">{html.escape(who)}</p><p class="sample"><b>{html.escape(prompt)}</b>'
                         f"{html.escape(text)}</p>")  # fmt: skip
        if len(samples) > SHOWN_SAMPLES:
            body += note(f"{run.name} has {len(samples) - SHOWN_SAMPLES} more in samples.json.")
    return section("Samples", note("Prompts in bold.") + body if body else note("No samples were kept."))


def _models(found: Sequence[Entry]) -> str:
    rows = []
    for e in found:
        cfg = e.run.learners[e.learner]
        model, counts = cfg.get("model") or {}, _parameters(cfg.get("model"))
        experts = f"{model.get('experts_per_token', '–')} of {model.get('num_experts', '–')}" if model else "–"
        rows.append([_named(e), html.escape(e.run.role(e.learner)), *(short(n) if n else "–" for n in counts),
                     *(html.escape(str(x)) for x in (model.get("num_layers", "–"), model.get("embed_dim", "–"), experts,
                                                     cfg.get("init") or "random"))])  # fmt: skip
    heads = ["learner", "role", "parameters", "active", "layers", "width", "experts", "weights from"]
    runs = list(dict.fromkeys(e.run for e in found))
    facts = {"folder": lambda run: run.folder, "preset": lambda run: run.config.get("name"),
             "steps": lambda run: f"{run.step:,}" + (f" of {run.train('steps'):,}" if run.train("steps") else ""),
             "tokens a learner": lambda run: short(_tokens(run)) if _tokens(run) > 0 else None,
             "batch": _rows, "seed": lambda run: run.train("seed"), "documents": _documents,
             "mesh": lambda run: _staged(run, lambda s: _mesh(s.get("mesh") or run.config["mesh"]))
                                 if run.config.get("mesh") else None,
             "from": lambda run: run.config.get("fork")}  # fmt: skip
    told = [[name, *(html.escape(_text(of(run))) for run in runs)] for name, of in facts.items()]
    table_of_runs = table(["run", *(html.escape(run.name) for run in runs)], told, text=True)
    missing = [run.name for run in runs if not run.config]
    lead = note(f"No config.json that could be read: {_listed(missing)}.") if missing else ""
    return section("Models and runs", lead + card(table(heads, rows), wide=True) + card(table_of_runs, wide=True))


def _documents(run: Run) -> str | None:
    data = run.config.get("data")
    if not data:
        return None
    weights = ", ".join(f"{name} {_text(w)}" for name, w in (data.get("weights") or {}).items())
    places = ", ".join(f"{name} {place}" for name, place in (data.get("sources") or {}).items())
    return (places or "the embedded corpora") + (f" ({weights})" if weights else "")


def _parameters(model: Mapping[str, Any] | None) -> tuple[int, int]:
    """(total, active) weights of an architecture, counted in the tree; active: all but the experts not visited."""
    from flax import nnx

    from llama4_jax.text import abstract

    try:
        given: Any = model or {}
        tower = VisionConfig(**given["vision"]) if given.get("vision") else None
        cfg = ModelConfig(**{**given, "rope": Rope(**given["rope"]), "vision": tower})
    except (KeyError, TypeError, ValueError):
        return 0, 0
    sizes = [(path, math.prod(weight.get_value().shape))
             for path, weight in nnx.to_flat_state(nnx.state(abstract(cfg), nnx.Param))]  # fmt: skip
    total, routed = sum(n for _, n in sizes), sum(n for path, n in sizes if "experts" in path)
    return total, total - routed // cfg.num_experts * (cfg.num_experts - cfg.experts_per_token)


def _made(found: Sequence[Entry]) -> str:
    runs = list(dict.fromkeys(e.run for e in found))
    rows = [[*([html.escape(run.name)] if len(runs) > 1 else []),
             *(html.escape(_text(made.get(field))) for field in ("what", "from", "where", "note"))]
            for run in runs for made in run.artifacts or [] if isinstance(made, dict)]  # fmt: skip
    if not rows:
        return section("What was made", note("No list of artifacts was kept."))
    heads = [*(["run"] if len(runs) > 1 else []), "what", "from", "where", "note"]
    return section("What was made", card(table(heads, rows, text=True), wide=True))


# --- Words and numbers


def _lines(found: Iterable[Entry], key: str) -> list[Line]:
    return [line for e in found if np.isfinite((line := e.line(key)).y).any()]


def _named(entry: Entry) -> str:
    swatch = f'<span class="swatch" style="background:{figures.color(entry.index)}"></span>'
    return swatch + html.escape(entry.label)


def _difference(value: float, first: float | None) -> str:
    if not math.isfinite(value):
        return "–"
    if first is None or not math.isfinite(first):
        return f"{value:.3f}"
    change = value - first
    kind = "better" if change < -5e-4 else "worse" if change > 5e-4 else "same"
    return f'{value:.3f} <span class="{kind}">{change:+.3f}</span>'.replace("-", "−")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _text(value: Any) -> str:
    return "–" if value is None or value == "" else str(value)
