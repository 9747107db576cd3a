"""`llama4 demo`: the whole way on this machine: a teacher, two students, exports, verification, samples, a report.

The models read text and images of handwritten digits in the same rows, and are asked to name digits they have not seen.

Run again, it goes on where it was stopped; what is done already is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import configs
from launch import overrides
from launch.train import status, train
from launch.verify import compare
from training.config import RunConfig

if TYPE_CHECKING:
    from etils import epath

TAKES_OVERRIDES = True
SHARED = ("--train.", "--data.", "--mesh.")
RUNS = {
    "behemoth": ("pretrain:tiny_behemoth_images", "a tiny Behemoth, which will teach"),
    "codistill": (
        "codistill:tiny_images",
        "a tiny Maverick and a tiny Scout learn from one pass of the frozen Behemoth",
    ),
    "labels": ("pretrain:tiny_images", "the same Scout on the same tokens, from labels alone"),
}
STUDENTS = ("maverick", "scout")
PROMPTS = ("def main(", "class Queue:\n", "Return the", "Parameters\n----------\n")
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--out DIR] [--train.FIELD VALUE ...] [--json]"
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="where everything goes (default: runs/demo)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON; the log goes to stderr")
    parser.epilog = (
        f"It trains {', '.join(preset for preset, _ in RUNS.values())} on text and images that come with the\n"
        "installed packages. Fields of train, data and mesh can be given, and hold for all three."
    )


def run(args: argparse.Namespace) -> int:
    from etils import epath

    runs = _runs(args)
    made: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for number, (name, cfg) in enumerate(runs.items(), 1):
            print(f"\n{number}. {RUNS[name][1]} ({cfg.name}, {cfg.train.steps} steps)", flush=True)
            summary = train(cfg)
            if not summary["complete"]:
                return status(summary)
            made[name] = summary
        made |= _after_training(epath.Path(args.out), runs)
    if args.json:
        print(json.dumps(made))
    return 0 if all(verdict["ok"] for verdict in made["verify"].values()) else 1


def _runs(args: argparse.Namespace) -> dict[str, RunConfig]:
    """The three runs under `--out`, in their order."""
    for option, *_ in args.overrides:
        if not option.startswith(SHARED):
            raise ValueError(f"llama4 demo takes fields of train, data and mesh, not {option}: see llama4 demo --help")
    out = args.out.rstrip("/")
    runs = {}
    for name, (preset, _) in RUNS.items():
        cfg = dataclasses.replace(overrides.apply(configs.find(preset), args), out=f"{out}/{name}")
        if "digits" not in cfg.data.sources:  # other documents than the preset's
            weights = {domain: share for domain, share in cfg.data.weights.items() if domain != "digits"}
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, weights=weights))
        if name == "codistill":
            teacher = dataclasses.replace(cfg.learners["behemoth"], init=f"run:{out}/behemoth")
            cfg = dataclasses.replace(cfg, learners=cfg.learners | {"behemoth": teacher})
        runs[name] = cfg
    return runs


def _after_training(out: epath.Path, runs: dict[str, RunConfig]) -> dict[str, Any]:
    """Exports, verification, samples and the report: what was made by each."""
    from training import report

    folder = out / "codistill"
    made = Made(out / "demo.json", [cfg.train.steps for cfg in runs.values()])
    print("\n4. Export the students to Hugging Face's format")
    exports = made.stage("export", lambda: {name: _export(folder, name, out / f"hf-{name}") for name in STUDENTS})
    print("\n5. Verify the exports")
    verified = _verify(made, exports)
    print("\n6. Let them continue a few prompts")
    samples = made.stage("samples", lambda: _samples(folder, out / "labels"))
    for name, texts in samples.items():
        (out / name / "samples.json").write_text(json.dumps(texts, indent=1))
        for text in texts[:1]:
            print(f"--- {name}/{text['learner']}: {text['prompt']}{text['text']}")
    print("\n7. Let them name handwritten digits that they have not seen")
    named = made.stage("naming", lambda: _naming(out, runs))
    for name, one in named.items():
        print(f"{name}: {one['text']}")
    (folder / "artifacts.json").write_text(json.dumps(_artifacts(out, exports, verified), indent=1))
    page = report.write([str(out / name) for name in ("codistill", "labels", "behemoth")], str(out / "report.html"))
    _print_table(out, runs, verified, named, str(page))
    return dict(export=exports, verify=verified, samples=samples, naming=named, report=str(page))


class Made:
    """Results of the stages for runs of these lengths, in a JSON file; those of other lengths do not count."""

    def __init__(self, file: epath.Path, steps: list[int]):
        stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self._file = file
        self._done: dict[str, Any] = stored if stored.get("steps") == steps else {"steps": steps}

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result, from the file if it was done before."""
        if name not in self._done:
            self._done[name] = make()
            self._file.write_text(json.dumps(self._done, indent=2) + "\n")
        return self._done[name]


def _export(run: epath.Path, learner: str, to: epath.Path) -> dict[str, Any]:
    from training.checkpoint import restore_params
    from training.export_params import save_hf
    from training.load import run_tokenizer

    weights = restore_params(run, learner)
    if to.exists():  # of a shorter run, or one whose record was lost
        to.rename(to.with_name(f"{to.name}-before-{time.time_ns()}"))
    model = weights.config.learners[learner].model
    save_hf(weights.params, model, to, dtype="float32", tokenizer=run_tokenizer(run, weights.config))
    size = sum(file.stat().length for file in to.iterdir())
    print(f"{to}: {size / 1e6:.1f} MB")
    return dict(folder=str(to), bytes=size, dtype="float32")


def _verify(made: Made, exports: dict[str, Any]) -> dict[str, Any]:
    """The comparisons by student: with transformers where it is installed, else with the NumPy oracle."""
    against = "numpy"
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        print(f"{' and '.join(missing)} not installed, so compared with the NumPy oracle (make demo EXTRAS=verify)")
    else:
        against = "transformers"
    verified = made.stage(
        f"verify against {against}",
        lambda: {name: compare(one["folder"], against) for name, one in exports.items()},
    )
    for name, one in verified.items():
        print(f"{name}: {one['text']}")
    return verified


def _samples(codistilled: epath.Path, alone: epath.Path) -> dict[str, list[dict[str, str]]]:
    """Continuations by run, at the temperature and top-p published with Llama 4."""
    out: dict[str, list[dict[str, str]]] = {codistilled.name: [], alone.name: []}
    for folder, learner in ((codistilled, "scout"), (codistilled, "maverick"), (alone, "scout")):
        texts = _continue(folder, learner)
        out[folder.name] += [dict(learner=learner, prompt=p, text=t) for p, t in zip(PROMPTS, texts, strict=True)]
    return out


def _continue(folder: epath.Path, learner: str) -> list[str]:
    import jax

    from llama4_jax.generate import generate
    from training.load import load_model

    model, tokenizer, stops = load_model(str(folder), learner)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    new = generate(model, prompts, NEW_TOKENS, key=jax.random.key(0), eos_ids=stops)
    return [tokenizer.decode(ids) for ids in new]


def _naming(out: epath.Path, runs: dict[str, RunConfig]) -> dict[str, Any]:
    """By run and learner: how many held-out digits it names (`training/naming.py`); nothing without digits."""
    if "digits" not in runs["codistill"].data.sources:
        print("no digits among the documents")
        return {}
    from launch.startup import open_corpus
    from training.checkpoint import restore_params
    from training.naming import naming

    found: dict[str, Any] = {}
    corpus = open_corpus(runs["codistill"], log=lambda line: None)
    for name, learner in (
        ("behemoth", "behemoth"),
        ("codistill", "maverick"),
        ("codistill", "scout"),
        ("labels", "scout"),
    ):
        weights = restore_params(out / name, learner)
        one = naming(weights.config.learners[learner], weights.params, corpus, "digits", runs[name].train.seq_len)
        found[f"{name}/{learner}"] = dict(images=one.images, named=one.named, commonest=one.commonest, text=str(one))
    return found


def _artifacts(out: epath.Path, exports: dict[str, Any], verified: dict[str, Any]) -> list[dict[str, str]]:
    rows = [{"what": f"the run {name}", "from": RUNS[name][0], "where": str(out / name), "note": RUNS[name][1]}
            for name in RUNS]  # fmt: skip
    for name, one in exports.items():
        rows.append({"what": f"tiny {name.capitalize()} for Hugging Face", "from": str(out / "codistill"),
                     "where": one["folder"], "note": verified[name]["text"]})  # fmt: skip
    return rows


def _print_table(
    out: epath.Path, runs: dict[str, RunConfig], verified: dict[str, Any], named: dict[str, Any], page: str
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from training import metrics

    table = Table("made", "where", "result", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, cfg in runs.items():
        last = metrics.read(out / name)[-1]
        held_out = ", ".join(
            f"{learner} {last[f'{metrics.prefix(learner, cfg)}eval/ce']:.3f}" for learner in cfg.learners
        )
        table.add_row(RUNS[name][0], str(out / name), f"held out: {held_out} nats a token")
    for name, one in named.items():
        table.add_row(f"{name} on images", str(out / name.partition("/")[0]), one["text"])
    for name, verdict in verified.items():
        table.add_row(f"{name} export", str(out / f"hf-{name}"), verdict["text"])
    table.add_row("report", page, "open it in a browser")
    Console(highlight=False).print("", table)
