"""The card of an exported model (README.md), written from what its run recorded."""

from __future__ import annotations

import json
import math
from typing import Any

from etils import epath

from data.llama4_tokenizer import Llama4Tokenizer
from data.tokenizer import Tokenizer
from training import metrics
from training.checkpoint_arrays import Arrays
from training.config import Learner, RunConfig
from training.flops import active_matmul_parameters
from training.safetensors_header import read_json


def card(arrays: Arrays, tokenizer: Tokenizer | None, dtype: str, quantised: str = "") -> str:
    """Markdown: what the model is, how it was trained, on what, how well it predicts, under whose licences it is."""
    cfg, name = arrays.config, arrays.learner
    learner, model = cfg.learners[name], arrays.model
    built = _of_llama(learner, tokenizer)
    title = f"{'Llama ' if built else ''}{name} of {cfg.name}"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [llama4, llama4_jax]",
             *(["license: llama4"] if built else []), "---", "", f"# {title}", ""]  # fmt: skip
    total = sum(math.prod(shape) for path, shape in arrays.shapes.items() if path[-1] != "bias_E")
    lines += [
        f"A Llama 4 text model of {total:,} parameters ({active_matmul_parameters(model):,} of them multiply a token), "
        f"written by `llama4 export` from step {arrays.step:,} of the run, in {dtype}"
        f"{f', projections and experts in {quantised}' if quantised else ''}. `llama4 verify .` checks it.",
        "", "## Model", "",
        *_table([
            ("layers", model.num_layers), ("width", model.embed_dim), ("heads", f"{model.num_heads} of "
             f"{model.head_dim}, {model.num_kv_heads} for keys and values"),
            ("experts", f"{model.num_experts} and a shared one, {model.experts_per_token} chosen, in every "
             f"{_ordinal(model.moe_every)}layer"),
            ("attention", f"in chunks of {model.chunk:,} with RoPE; in every {_ordinal(model.nope_every)}layer global, "
             "without"),
            ("longest context", f"{model.max_position:,}"), ("vocabulary", f"{model.vocab_size:,}"),
        ]),
        "", "## Training", "", *_training(cfg, learner, arrays.step), "", "## Data", "", *_data(arrays, tokenizer), "",
        "## Results", "", *_results(arrays), "", "## Licence", "", *_licence(learner, built, tokenizer), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_plain(a)} | {_plain(b)} |" for a, b in rows)]


def _plain(text: Any) -> str:
    """Text that stays within its cell, whatever a name holds."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _ordinal(n: int) -> str:
    return {1: "", 2: "second ", 3: "third ", 4: "fourth "}.get(n, f"{n}th ")


def _training(cfg: RunConfig, learner: Learner, step: int) -> list[str]:
    if step == 0:
        return [f"None here: the weights are those of `{_plain(learner.init or 'the seed')}`."]
    at = cfg.at(step)
    rows: list[tuple[str, Any]] = [
        ("steps", f"{step:,} of {cfg.train.steps:,}"),
        ("tokens a step", f"{at.train.batch * at.train.seq_len:,} in rows of {at.train.seq_len:,}"),
        ("beginning", f"`{learner.init}`" if learner.init else f"seed {cfg.train.seed}"),
    ]
    if o := learner.optimizer:
        rows.append(("optimizer", f"{o.kind}, learning rate {o.learning_rate:g} after {o.warmup} steps, falling over "
                     f"the last {o.decay:.0%} to {o.final:g} of it; weight decay {o.weight_decay:g}"))  # fmt: skip
    rows.append(("arithmetic", f"{learner.compute_dtype}, masters fp32, eight bits: {learner.quant}"))
    rows += [("stage", f"from step {s.after:,}: {s.batch or at.train.batch} rows of {s.seq_len or at.train.seq_len:,}")
             for s in cfg.stages if s.after < step]  # fmt: skip
    if teacher := learner.distillation.teacher:
        d = learner.distillation
        rows.append(("teacher", f"`{teacher}`{_teacher(cfg, teacher)}; divergence {d.divergence}, soft weight "
                     f"{d.soft:g} ({d.schedule})"))  # fmt: skip
    return [*_table(rows), "", "The whole configuration is `config.json` of the run."]


def _teacher(cfg: RunConfig, name: str) -> str:
    """What is known of which teacher it was."""
    if name in cfg.learners:
        init = cfg.learners[name].init
        if init.startswith("run:"):
            try:
                found = Arrays(init.removeprefix("run:"), name if name in _learners(init) else None)
                return f" (`{init}` at step {found.step}, manifest sha256 {found.identity()})"
            except (ValueError, FileNotFoundError, KeyError):
                return f" (`{init}`, which cannot be read any more)"
        return f" (`{init or 'seed'}`)"
    if name.startswith("targets:"):
        try:
            first = min(epath.Path(name.removeprefix("targets:")).glob("*.json"))
            return f" (of the teacher with digest {read_json(first).get('teacher')})"
        except (ValueError, FileNotFoundError):
            return ""
    return ""


def _learners(init: str) -> dict[str, Any]:
    return read_json(epath.Path(init.removeprefix("run:")) / "config.json").get("learners", {})


def _data(arrays: Arrays, tokenizer: Tokenizer | None) -> list[str]:
    cfg = arrays.config
    records = [r for r in metrics.read(arrays.folder) if r["step"] <= arrays.step]
    tokens = next((r["tokens_seen"] for r in reversed(records) if "tokens_seen" in r), 0)
    sources = cfg.data.sources or {"embedded": "text that comes with Python and the installed packages"}
    file = arrays.folder / "data.json"
    facts = json.loads(file.read_text()) if file.exists() else {}
    shares = {name: mixed["read"] for name, mixed in facts.get("mixture", {}).items()}  # of its first batches
    lines = [f"{tokens:,} tokens counted in the loss." if arrays.step else "None here.", ""]
    rows = [(name, f"`{place}`") for name, place in sources.items()]
    rows += [(f"{name}: share", f"{share:.1%}, about {share * tokens:,.0f} tokens") for name, share in shares.items()]
    rows.append(("tokenizer", f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.hash}" if tokenizer else "none"))
    return [*lines, *_table(rows)]


def _results(arrays: Arrays) -> list[str]:
    start = metrics.prefix(arrays.learner, arrays.config)
    records = [r for r in metrics.read(arrays.folder) if r["step"] <= arrays.step]
    rows: list[tuple[str, Any]] = []
    if trained := [r for r in records if f"{start}loss" in r]:
        last = trained[-1]
        rows.append((f"training loss, step {last['step']:,}", f"{last[f'{start}loss']:.4f}"))
    if measured := [r for r in records if f"{start}eval/ce" in r]:
        last = measured[-1]
        for key, value in last.items():
            if key.startswith(f"{start}eval/ce"):
                domain = key.removeprefix(f"{start}eval/ce").lstrip("/")
                rows.append((f"held out, step {last['step']:,}{f', {domain}' if domain else ''}",
                             f"{value:.4f} nats a token"))  # fmt: skip
    return _table(rows) if rows else ["The run recorded none."]


def _of_llama(learner: Learner, tokenizer: Tokenizer | None) -> bool:
    """Whether imported weights, or Llama 4's tokenizer, were used."""
    return learner.init.startswith("hf:") or isinstance(tokenizer, Llama4Tokenizer)


def _licence(learner: Learner, built: bool, tokenizer: Tokenizer | None) -> list[str]:
    if not built:
        return ["The weights were made from scratch by this run: they are under what its owner and its data allow."]
    what = [f"began with the weights `{learner.init}`"] if learner.init.startswith("hf:") else []
    what += ["uses Llama 4's tokenizer"] if isinstance(tokenizer, Llama4Tokenizer) else []
    return [
        "**Built with Llama.**", "",
        f"This model {' and '.join(what)}. If those are Meta's, this folder is under the Llama 4 Community License: "
        "who passes it on adds the agreement and the notice it asks for, keeps to its acceptable use policy, and "
        'begins the model\'s name with "Llama".',
    ]  # fmt: skip
