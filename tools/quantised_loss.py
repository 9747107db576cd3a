"""What quantised export costs a trained run in held-out loss, and whether transformers reads the folders alike.

    llama4 train pretrain:tiny --out runs/tiny
    python -m tools.quantised_loss runs/tiny

Exports the run's newest checkpoint in bf16 and in each scheme, reads each folder back and evaluates it on the run's own
held-out rows, by the program that evaluates in training. Where transformers and compressed-tensors are installed (the
extra `verify-quantised`), transformers loads each quantised folder, too (fp32, eager attention, weights as
compressed-tensors decompresses them), and its logits of `ROWS` held-out documents are set beside this project's on the
weights dequantised here: the largest difference over the largest logit. Beside it stands what rounding those weights to
bf16 changes here, which is as far as a reader that dequantises into bf16 may be off. Prints a Markdown table. The
status is 1 where a scheme costs more than --most nats, or transformers is further off than that rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.batch import Batch
from data.loader import Corpus
from launch import export
from launch.startup import cache_folder
from llama4_jax.text import Transformer, abstract
from training.checkpoint import restore_params
from training.config import Learner, MeshConfig
from training.evaluate import evaluate, make_eval_step
from training.hf_import import load_hf
from training.load import run_tokenizer
from training.mesh import make_mesh

ROWS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a trained run")
    parser.add_argument("--learner", help="which model, where the run has several")
    parser.add_argument("--schemes", nargs="+", default=["int4-g32"], choices=export.QUANTISED)
    parser.add_argument("--most", type=float, default=0.02, help="nats that a scheme may cost (default: 0.02)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE, too")
    args = parser.parse_args()
    weights = restore_params(args.run, args.learner)
    learner, train = weights.config.learners[weights.learner], weights.config.train
    log = partial(print, file=sys.stderr)
    corpus = Corpus.open(weights.config.data, cache_folder(), log, run_tokenizer(args.run, weights.config))
    batches = corpus.heldout(train.batch, train.seq_len, learner.model.chunk, train.eval_batches)
    mesh = make_mesh(MeshConfig())
    step = make_eval_step(learner, mesh, len(corpus.domains))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for form in ("bfloat16", *args.schemes):
            folder = Path(place) / form
            export.write(args.run, str(folder), args.learner, None, "bfloat16", _scheme(form), "2GB")
            params = load_hf(folder)
            loss = evaluate(step, params, batches, mesh, corpus.domains)["ce"]
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            row = dict(form=form, loss=loss, megabytes=size / 1e6)
            if _scheme(form) and all(map(importlib.util.find_spec, ("transformers", "compressed_tensors"))):
                row |= beside_transformers(folder, learner, params, documents(batches))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    worse = [r for r in rows if r["loss"] - rows[0]["loss"] > args.most or r.get("off", 0) > r.get("rounding", 0)]
    return 1 if worse else 0


def _scheme(form: str) -> str | None:
    return form if form in export.QUANTISED else None


def documents(batches: Sequence[Batch]) -> list[np.ndarray]:
    """The first documents of the first held-out rows: tokens alone, as an implementation without packing reads them."""
    rows = [(tokens, ids) for batch in batches for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True)]
    return [tokens[ids == ids[0]] for tokens, ids in rows[:ROWS]]


def beside_transformers(
    folder: Path, learner: Learner, params: nnx.State, texts: Sequence[np.ndarray]
) -> dict[str, float]:
    """`off`: max |theirs - ours| / max |ours| of the logits; `rounding`: of ours on weights rounded to bf16."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    theirs, info = loaded
    if any(info.values()):
        raise ValueError(f"transformers does not load {folder} whole: {info}")
    graphdef = nnx.split(abstract(learner.model))[0]

    @jax.jit
    def ours(params: nnx.State, ids_BT: jax.Array) -> jax.Array:
        model: Transformer = nnx.merge(graphdef, params)
        return model.logits(ids_BT)

    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    off, rounding, largest = 0.0, 0.0, 0.0
    for text in texts:
        exact = np.asarray(ours(params, jnp.asarray(text[None])))
        with torch.no_grad():
            got: Any = theirs(torch.from_numpy(text[None].astype(np.int64))).logits.float().numpy()
        off = max(off, float(np.abs(got - exact).max()))
        rounding = max(rounding, float(np.abs(np.asarray(ours(rounded, jnp.asarray(text[None]))) - exact).max()))
        largest = max(largest, float(np.abs(exact).max()))
    return dict(off=off / largest, rounding=rounding / largest)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| weights | MB | held out | more than bf16 | transformers' logits off by | rounding to bf16 changes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        apart = f"{row['off']:.1e} | {row['rounding']:.1e}" if "off" in row else " | "
        more = row["loss"] - rows[0]["loss"]
        lines.append(f"| {row['form']} | {row['megabytes']:.1f} | {row['loss']:.4f} | {more:+.4f} | {apart} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
