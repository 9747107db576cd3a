"""Our training step beside transformers' on this machine's CPU: the same model, weights, tokens and optimizer.

    python -m tools.bench_cpu --rounds 5 --docs docs/performance.md

A small Scout-like model (`MODEL`), fp32, AdamW after clipping by the global norm, cross-entropy over all tokens.
Ours is the step of `llama4 train`; theirs is `Llama4ForCausalLM` on PyTorch with as many threads as there are cores,
under each attention implementation of its that trains. Every one lives in a process of its own. They take turns, a few
steps each, so that whatever else the machine does falls on all of them; a ratio compares the two of one round. Before
that, all compute the loss of the same tokens from the same weights, which our export hands over: they must agree.

Prints a Markdown table and, with --docs, writes it into that file between the two lines with its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama4_jax.config import ModelConfig
from training.config import Learner, OptimizerConfig, RunConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=4096, embed_dim=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, expert_dim=512,
    dense_dim=512, num_experts=4, chunk=512,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, warmup=0, decay=0.0)
LEARNER = Learner(MODEL, OPTIMIZER, compute_dtype="float32", remat="none")
RUN = RunConfig("bench:cpu", {"model": LEARNER}, train=TrainConfig(steps=10_000, batch=2, seq_len=1024))
PEERS = ("sdpa", "eager")
BEGIN, END = "<!-- bench-cpu: begin -->", "<!-- bench-cpu: end -->"
TOLERANCE = 1e-5
"""Of the losses of the first step, relative."""


# --- The workers: one process each


def ours(folder: str) -> tuple[float, Callable[[], Any], dict[str, Any]]:
    """(loss of the first step, a function that does a step and waits for it, what ran); exports the weights first."""
    import jax

    from training.bench import synthetic_batches
    from training.export_params import save_hf
    from training.loop import put_local
    from training.mesh import make_mesh
    from training.state import create_state, execution
    from training.step import make_train_step

    mesh = make_mesh(RUN.mesh)
    batches = [put_local(batch, mesh) for batch in synthetic_batches(RUN)]
    train_step = make_train_step(RUN, mesh, domains=1)
    state = create_state(RUN, mesh)
    save_hf(state.learners["model"].params, MODEL, folder, dtype="float32")
    done = 0

    def step() -> Any:
        nonlocal state, done
        state, metrics = train_step(state, batches[done % len(batches)])
        done += 1
        return jax.block_until_ready((state, metrics))[1]

    sums = jax.device_get(step())["model"]["sums"]
    how = execution(LEARNER, mesh)
    facts = dict(attention=how.attention, grouped_matmul=how.grouped_matmul, dispatch=how.dispatch, remat=how.remat,
                 parameters=sum(x.size for x in jax.tree.leaves(state.learners["model"].params)))  # fmt: skip
    return float(sums.domain_ce.sum() / sums.tokens), step, facts


def theirs(folder: str, attention: str) -> tuple[float, Callable[[], Any], dict[str, Any]]:
    """The same of transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Llama4ForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    from training.bench import synthetic_batches

    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    load: Any = Llama4ForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )  # fmt: skip
    batches = [
        (torch.from_numpy(b.tokens).long(), torch.from_numpy(b.labels).long().flatten()) for b in synthetic_batches(RUN)
    ]
    done = 0

    def step() -> float:
        nonlocal done
        tokens, labels = batches[done % len(batches)]
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    parameters = sum(p.numel() for p in model.parameters())
    return step(), step, dict(attention=attention, parameters=parameters)


def worker(name: str, folder: str) -> None:
    """Say the first loss, then for every number n on stdin do n steps and say their seconds."""
    loss, step, facts = ours(folder) if name == "ours" else theirs(folder, name)
    for _ in range(2):
        step()
    print(json.dumps(dict(loss=loss, **facts)), flush=True)
    for line in sys.stdin:
        seconds = []
        cpu = time.process_time()
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(dict(seconds=seconds, cpu=(time.process_time() - cpu) / len(seconds))), flush=True)


# --- The comparison


class Worker:
    """A worker's process, and what it said."""

    def __init__(self, name: str, folder: Path):
        command = [sys.executable, "-m", "tools.bench_cpu", "--worker", name, "--folder", str(folder)]
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=Path(__file__).resolve().parent.parent, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.seconds: list[float] = []  # the median of each round
        self.cpu: list[float] = []
        self.facts = self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name!r} ended with status {self.process.wait()}")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        said = self._hear()
        self.seconds.append(statistics.median(said["seconds"]))
        self.cpu.append(said["cpu"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default: 4)")
    parser.add_argument("--docs", metavar="FILE", help="write the table into this file, between its marks")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "weights"
        workers = [Worker(name, folder) for name in ("ours", *PEERS)]
        check_losses(workers)
        for number in range(args.rounds):
            for one in workers:
                one.turn(args.steps)
            shown = ", ".join(f"{one.name} {one.seconds[-1] * 1e3:.0f} ms" for one in workers)
            print(f"round {number + 1} of {args.rounds}: {shown}", file=sys.stderr)
        for one in workers:
            one.close()
    text = table(workers, args.steps)
    print(text)
    if args.docs:
        insert(Path(args.docs), text)
    if args.json:
        numbers = {one.name: dict(seconds=one.seconds, cpu=one.cpu, **one.facts) for one in workers}
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")


def check_losses(workers: list[Worker]) -> None:
    """Equal weights give equal losses, or the speeds are of different things."""
    mine = workers[0]
    for other in workers[1:]:
        if mine.facts["parameters"] != other.facts["parameters"]:
            raise SystemExit(f"{mine.facts['parameters']} parameters here, {other.facts['parameters']} in {other.name}")
        if abs(mine.facts["loss"] / other.facts["loss"] - 1) > TOLERANCE:
            raise SystemExit(f"loss {mine.facts['loss']} here, {other.facts['loss']} with {other.name}")


def table(workers: list[Worker], steps: int) -> str:
    """Rates, and how much faster we are, in the quietest round of each and in the median one."""
    mine = workers[0]
    tokens = RUN.train.batch * RUN.train.seq_len
    lines = [
        "| step | tokens/s, best round | ours is faster, best rounds | tokens/s, median round | "
        "ours is faster, round by round: median (range) | CPU seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for one in workers:
        best, middle = min(one.seconds), statistics.median(one.seconds)
        ratios = [a / b for a, b in zip(one.seconds, mine.seconds, strict=True)]
        other = one is not mine
        name = f"transformers, {one.name} attention" if other else "llama4_jax"
        at_best = f"**{best / min(mine.seconds):.2f}x**" if other else ""
        by_round = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if other else ""
        lines.append(f"| {name} | {tokens / best:,.0f} | {at_best} | {tokens / middle:,.0f} | {by_round} | "
                     f"{statistics.median(one.cpu):.2f} |")  # fmt: skip
    f = mine.facts
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "transformers", "torch"))
    losses = ", ".join(f"{one.facts['loss']:.6f}" for one in workers)
    return "\n".join([
        *lines, "",
        f"{len(mine.seconds)} rounds of {steps} steps each in turn, a round's time the median of its steps. "
        f"{os.cpu_count()} CPU cores ({processor()}), Python {platform.python_version()}, {versions}. "
        f"Ours: attention `{f['attention']}`, "
        f"dispatch `{f['dispatch']}` (dropless), grouped matmul `{f['grouped_matmul']}`, remat `{f['remat']}`, and the "
        f"router's losses, which theirs does not have. {f['parameters']:,} parameters. Loss of the first step, from "
        f"the same weights: {losses}.",
    ])  # fmt: skip


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def insert(file: Path, text: str) -> None:
    """Replace what stands between the marks."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file} lacks the lines {BEGIN} and {END}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
