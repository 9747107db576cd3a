"""`llama4 continue DIR --to OUT`: a Hugging Face folder trained on, perhaps with a teacher, exported and verified."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from typing import Any

import configs
from launch import overrides
from launch.train import status, train
from training.config import RunConfig

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} DIR --to OUT [--teacher DIR] [--FIELD VALUE ...] [--json]"
    parser.add_argument("folder", metavar="DIR", help="the model to train on, in Hugging Face's format")
    parser.add_argument(
        "--to", metavar="OUT", required=True, help="a folder: the run goes to OUT/run, the model to OUT/hf"
    )
    parser.add_argument("--teacher", metavar="DIR", help="a model that teaches it, in Hugging Face's format, frozen")
    parser.add_argument("--preset", metavar="NAME", default="pretrain:tiny",
                        help="where everything but the models comes from (default: pretrain:tiny)")  # fmt: skip
    parser.add_argument("--against", choices=("transformers", "numpy", "nothing"), default="transformers",
                        help="what the result's logits are compared with (default: transformers)")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--max-memory", default="2GB", help="of the export (default: 2GB)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON; the log goes to stderr")
    parser.epilog = (
        "A longer sequence, own text and the learning rate are fields of the run:\n"
        "  llama4 continue scout/ --teacher maverick/ --to longer --preset pretrain:scout_8k \\\n"
        "    --train.seq-len 262144 --data.sources text=my.jsonl --train.steps 500 \\\n"
        "    --learners.student.optimizer.learning-rate 1e-5\n"
        "The tokenizer is the folder's. Stopped or killed, the same command goes on where it was."
    )


def run(args: argparse.Namespace) -> int:
    cfg = _configuration(args)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        summary = train(cfg)
        if not summary["complete"]:
            return status(summary)
        made = _export_and_verify(args, cfg, summary["step"])
    if args.json:
        print(json.dumps(dict(run=summary, **made)))
    return 0 if made["ok"] else 1


def _configuration(args: argparse.Namespace) -> RunConfig:
    """The preset with the folder's model as `student`, after the teacher where there is one."""
    from data import tokenizer
    from training.config import Distillation
    from training.model_folder import read_config

    cfg = configs.find(args.preset)
    if len(cfg.learners) > 1:
        raise ValueError(f"continue trains one model: {args.preset} has {', '.join(cfg.learners)}")
    learner = next(iter(cfg.learners.values()))
    learners = {}
    if args.teacher:
        model = read_config(args.teacher)
        learners["teacher"] = dataclasses.replace(learner, model=model, optimizer=None, init=f"hf:{args.teacher}")
    taught = Distillation("teacher") if args.teacher else learner.distillation
    model = read_config(args.folder)
    learners["student"] = dataclasses.replace(learner, model=model, init=f"hf:{args.folder}", distillation=taught)
    file = tokenizer.find(args.folder)
    if file is None:
        raise FileNotFoundError(f"no {tokenizer.MODEL_FILE} or {tokenizer.HF_FILE} in {args.folder}")
    out = args.to.rstrip("/")
    data = dataclasses.replace(cfg.data, tokenizer=str(file))
    return overrides.apply(dataclasses.replace(cfg, learners=learners, data=data, out=f"{out}/run"), args)


def _export_and_verify(args: argparse.Namespace, cfg: RunConfig, step: int) -> dict[str, Any]:
    """The run's last checkpoint, of `step`, as OUT/hf; what was exported of a shorter run is set aside."""
    from etils import epath

    from launch import export, verify
    from training.model_folder import CONFIG, read_manifest

    to = epath.Path(args.to) / "hf"
    if to.exists():
        manifest = read_manifest(to)
        if ((manifest.get("source") or {}).get("step"), manifest.get("dtype")) != (step, args.dtype):
            aside = to.with_name(f"hf-before-{time.time_ns()}")
            print(f"{to} is of another step or dtype: it is now {aside}")
            to.rename(aside)
    if not (to / CONFIG).exists():
        export.write(cfg.folder, str(to), "student", None, args.dtype, None, args.max_memory)
    verified = verify.check(str(to), args.against, cfg.folder, print)
    return dict(folder=str(to), verify=verified, ok=verified["ok"])
