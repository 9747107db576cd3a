"""`llama4 verify DIR`: whether a Hugging Face folder is whole, computes what it should, and is its source's."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

Against = Literal["transformers", "numpy"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder in Hugging Face's format")
    parser.add_argument("--against", choices=("transformers", "numpy", "nothing"), default="transformers",
                        help="what to compare the logits with, a layer at a time; numpy is a small oracle that needs "
                        "no extra; nothing: only the files and the source")  # fmt: skip
    parser.add_argument("--source", metavar="RUN", help="the run it was exported from (default: where the manifest "
                        "says, if that is there)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of max |a - b| / max |b| (default: 1e-4)")
    parser.add_argument("--tokens", type=int, help="length of the random sequences (default: 3.5 chunks, at most 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where all is as it should be, 1 where something is not, or the comparison is undecided."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    settings = dict(tolerance=args.tolerance, tokens=args.tokens, seed=args.seed)
    result = check(args.folder, args.against, args.source, say, **settings)
    if args.json:
        print(json.dumps(result))
    return 0 if result["ok"] else 1


def check(
    folder: str, against: Against | Literal["nothing"], source: str | None, say: Callable[[str], object], **settings
) -> dict[str, Any]:
    """All three questions, as JSON has the answers: `files`, `source` and, beside them, those of `compare`, to which
    the `settings` go; `ok` where every one is. `say` takes a line for each."""
    from training.verify import check_files

    files = check_files(folder)
    say(f"{folder}: {files}")
    of = compare_source(folder, files.manifest, source)
    say(f"{folder}: {of['text']}")
    compared: dict[str, Any] = dict(ok=True)
    if against != "nothing":
        compared = compare(folder, against, say=say, **settings)
        say(f"{folder}: {compared['text']}")
    ok = files.ok and of["ok"] and compared["ok"]
    return compared | dict(files=dict(ok=files.ok, text=str(files), problems=files.problems), source=of, ok=ok)


def compare(
    folder: str, against: Against = "transformers", tolerance: float = 1e-4, tokens: int | None = None, seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """The comparison of `training.verify.verify` as JSON has it."""
    from training.verify import verify

    result = verify(folder, tolerance, tokens, against=against, seed=seed, say=say)
    return dataclasses.asdict(result) | dict(ok=result.ok, undecided=result.undecided, text=str(result))


def compare_source(folder: str, manifest: dict[str, Any], given: str | None) -> dict[str, Any]:
    """Whether the folder's weights are those of the run's checkpoint: exactly, or where they were rounded to bfloat16,
    as that rounds. A quantised one may be off by less than the largest of its matrix, which any scale that is kept
    leaves; how far is said."""
    from training import diff
    from training.weights import FolderWeights, RunWeights

    about = manifest.get("source") or {}
    place = given or about.get("folder", "")
    if not place:
        return dict(ok=True, compared=False, text="source not compared: the manifest names none, give --source RUN")
    try:
        source = RunWeights(place, about.get("learner"), about.get("step"))
    except FileNotFoundError:
        if given:
            raise
        return dict(ok=True, compared=False, text=f"source not compared: {place} is not there, give --source RUN")
    if "manifest_sha256" in about and about["manifest_sha256"] != source.arrays.identity():
        text = f"NOT the source: {source.where} is not the checkpoint that was exported, its manifest differs"
        return dict(ok=False, compared=True, text=text)
    exported = FolderWeights(folder)
    quantised, worst, wrong, count = manifest.get("quantisation"), 0.0, [], 0
    for one in diff.compare(exported, source, rounded=manifest.get("dtype") == "bfloat16"):
        count += 1
        matrix = one.name.rpartition(".")[2].startswith("w")  # others stay as they are
        if quantised and matrix and one.relative < 1:  # not NaN
            worst = max(worst, one.relative)
        elif not one.equal:
            wrong.append(one)
    if wrong:
        first = f"{f'layer {wrong[0].layer} ' if wrong[0].layer is not None else ''}{wrong[0].name}"
        text = f"NOT EQUAL to {source.where}: {len(wrong)} of {count} weights differ, first {first}"
        return dict(ok=False, compared=True, text=text)
    text = f"equal to {source.where}: {count} weights" + (
        f", quantised ones within {worst:.2e} of the largest" if quantised else f" in {manifest.get('dtype')}"
    )
    return dict(ok=True, compared=True, worst_quantised=worst, text=text)
