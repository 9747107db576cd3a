"""Whole training steps of the real sizes, compiled ahead of time for devices that are not here: memory and time.

    python -m tools.compile_steps                       # what there is
    python -m tools.compile_steps scout_8k_v5p          # one program, as JSON; a process each, so nothing is shared
    python -m tools.compile_steps scout_8k_v5p --reduce-dtype bfloat16

TPUs need the extra `tpu` (libtpu, no TPU), H100s the extra `cuda` (no GPU, see `tools/h100.py`), both need tokamax
(`llama4_jax/kernels/tokamax.py` says how to install it). Nothing runs: this shows that a program compiles and what
it holds, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: its CUDA plugin would look for a driver
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from llama4_jax.config import MODELS
from training.config import Learner, MeshConfig, RunConfig, TrainConfig

GIB = 2**30


class Program(NamedTuple):
    """A step: the model, the devices (v5p:4x4x8, or h100:HOSTSx8), rows of a step, tokens of a row."""

    model: str
    devices: str
    batch: int
    seq_len: int
    mesh: MeshConfig
    how: dict


EXPERTS = dict(dispatch="all_to_all", capacity=1.25)
PROGRAMS = {
    "scout_8k_v5p": Program(
        "scout", "v5p:4x4x8", 1024, 8192, MeshConfig(), dict(remat="layer", microbatches=4)
    ),
    "scout_256k_v5p": Program(
        "scout", "v5p:4x8x8", 8, 262_144, MeshConfig(context=32), dict(remat="layer")
    ),
    "behemoth_8k_v5p": Program(
        "behemoth", "v5p:8x16x16", 2048, 8192, MeshConfig(expert=16), dict(remat="layer", **EXPERTS)
    ),
    "scout_8k_h100": Program("scout", "h100:8x8", 64, 8192, MeshConfig(expert=8), dict(remat="layer", **EXPERTS)),
    "scout_256k_h100": Program(
        "scout", "h100:16x8", 16, 262_144, MeshConfig(expert=8, context=8), dict(remat="layer", **EXPERTS)
    ),
}  # fmt: skip


def devices_of(name: str) -> list:
    from tools import h100
    from training.plan import tpu_devices

    kind, _, shape = name.partition(":")
    return h100.topology(*(int(n) for n in shape.split("x"))) if kind == "h100" else tpu_devices(name)


def compile_program(program: Program, layers: int | None, **how) -> dict:
    """Compile it; seconds, CPU seconds, and GiB a device."""
    from tools.h100 import cross_compiling
    from training.mesh import check_fits, make_mesh
    from training.plan import compile_step
    from training.state import execution

    model = MODELS[program.model]()
    model = replace(model, num_layers=layers or model.num_layers)
    learner = Learner(model, **(program.how | how))
    cfg = RunConfig("aot", {"model": learner}, mesh=program.mesh,
                    train=TrainConfig(batch=program.batch, seq_len=program.seq_len))  # fmt: skip
    mesh = make_mesh(cfg.mesh, devices_of(program.devices))
    check_fits(cfg, mesh)
    with cross_compiling() if program.devices.startswith("h100") else nullcontext():
        _, cost = compile_step(cfg, mesh)
    used, run = resource.getrusage(resource.RUSAGE_SELF), execution(learner, mesh)
    return dict(
        devices=program.devices, mesh=dict(mesh.shape), batch=program.batch, seq_len=program.seq_len,
        microbatches=learner.microbatches, remat=run.remat, offload=run.offload, reduce_dtype=run.reduce_dtype,
        attention=run.attention, exchange=run.exchange, dispatch=run.dispatch, grouped_matmul=run.grouped_matmul,
        trace_s=round(cost.trace, 1), compile_s=round(cost.compile, 1), cpu_s=round(used.ru_utime + used.ru_stime, 1),
        host_gib=round(used.ru_maxrss / 2**20, 2), arguments=round(cost.arguments / GIB, 2),
        temporaries=round(cost.temporaries / GIB, 2), other_outputs=round(cost.outputs / GIB, 2),
        peak=round(cost.peak / GIB, 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", choices=PROGRAMS)
    parser.add_argument("--layers", type=int, help="in place of the model's own number")
    parser.add_argument("--remat")
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--attention")
    parser.add_argument("--offload", action="store_true", default=None)
    parser.add_argument("--reduce-dtype", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    if args.program is None:
        print("\n".join(f"{name}: {p.model}, {p.batch} x {p.seq_len} on {p.devices}" for name, p in PROGRAMS.items()))
        return
    how = {name: value for name, value in vars(args).items() if value is not None and name not in ("program", "layers")}
    print(json.dumps(dict(program=args.program) | compile_program(PROGRAMS[args.program], args.layers, **how)))
    sys.stdout.flush()
    os._exit(0)  # libtpu's threads do not always end


if __name__ == "__main__":
    main()
