"""Whole training steps of the real sizes, compiled ahead of time for devices that are not here: memory and time.

    python -m tools.compile_steps                       # what there is
    python -m tools.compile_steps scout_8k_v5p          # one program, as JSON; a process each, so nothing is shared
    python -m tools.compile_steps scout_8k_v5p --reduce-dtype bfloat16

TPUs need the extra `tpu` (libtpu, no TPU), H100s the extra `cuda` (no GPU, see `training/h100.py`), both need tokamax
(`llama4_jax/kernels/tokamax.py` says how to install it). Nothing runs: this shows that a program compiles and what
it holds, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from dataclasses import replace
from typing import NamedTuple

from llama4_jax.config import MODELS
from training.config import Learner, MeshConfig, OptimizerConfig, RunConfig, TrainConfig

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

BF16_MOMENT = OptimizerConfig(moment_dtype="bfloat16")
MORE = {
    "scout_8k_v5p_nested": PROGRAMS["scout_8k_v5p"]._replace(how=dict(remat="nested")),
    "scout_256k_v5p_nested": PROGRAMS["scout_256k_v5p"]._replace(how=dict(remat="nested")),
    "behemoth_8k_v5p_nested": PROGRAMS["behemoth_8k_v5p"]._replace(how=dict(remat="nested", **EXPERTS)),
    "maverick_8k_v5p": Program(
        "maverick", "v5p:8x8x8", 1024, 8192, MeshConfig(expert=32), dict(remat="layer", microbatches=2, **EXPERTS)
    ),
    "scout_8k_h100_nested": PROGRAMS["scout_8k_h100"]._replace(how=dict(remat="nested", **EXPERTS)),
    "scout_8k_h100_block": PROGRAMS["scout_8k_h100"]._replace(how=dict(remat="block", **EXPERTS)),
    "scout_8k_h100_attention": PROGRAMS["scout_8k_h100"]._replace(how=dict(remat="attention", **EXPERTS)),
    "scout_8k_h100_rows": PROGRAMS["scout_8k_h100"]._replace(batch=128, how=dict(remat="nested", **EXPERTS)),
    "scout_8k_h100_parts": PROGRAMS["scout_8k_h100"]._replace(
        batch=256, how=dict(remat="layer", microbatches=4, **EXPERTS)
    ),
    "scout_8k_h100_fsdp": PROGRAMS["scout_8k_h100"]._replace(mesh=MeshConfig(), how=dict(remat="nested")),
    "scout_8k_h100_moment": PROGRAMS["scout_8k_h100"]._replace(
        how=dict(remat="layer", optimizer=BF16_MOMENT, **EXPERTS)
    ),
    "scout_8k_h100_tensor": PROGRAMS["scout_8k_h100"]._replace(
        batch=32, mesh=MeshConfig(expert=8, tensor=2), how=dict(remat="layer", **EXPERTS)
    ),
    "scout_8k_128h100": PROGRAMS["scout_8k_h100"]._replace(devices="h100:16x8", batch=256),
    "scout_64k_h100": PROGRAMS["scout_256k_h100"]._replace(batch=32, seq_len=65_536),
    "scout_256k_h100_nested": PROGRAMS["scout_256k_h100"]._replace(how=dict(remat="nested", **EXPERTS)),
    "scout_256k_256h100": PROGRAMS["scout_256k_h100"]._replace(devices="h100:32x8", batch=32),
    "maverick_8k_h100": Program(
        "maverick", "h100:32x8", 256, 8192, MeshConfig(expert=16), dict(remat="layer", **EXPERTS)
    ),
    "maverick_8k_h100_nested": Program(
        "maverick", "h100:16x8", 128, 8192, MeshConfig(expert=32), dict(remat="nested", **EXPERTS)
    ),
    "maverick_256k_h100": Program(
        "maverick", "h100:64x8", 64, 262_144, MeshConfig(expert=16, context=8), dict(remat="layer", **EXPERTS)
    ),
    "behemoth_8k_h100": Program(
        "behemoth", "h100:256x8", 2048, 8192, MeshConfig(expert=16), dict(remat="nested", **EXPERTS)
    ),
}  # fmt: skip
"""Variations, to hold the planner's estimate of memory against."""


def compile_program(program: Program, layers: int | None, **how) -> dict:
    """Compile it; seconds, CPU seconds, and GiB a device."""
    from training.ahead import compile_step, devices_of, no_device_needed
    from training.mesh import check_fits, make_mesh
    from training.state import execution

    no_device_needed()
    model = MODELS[program.model]()
    model = replace(model, num_layers=layers or model.num_layers)
    learner = Learner(model, **(program.how | how))
    cfg = RunConfig("aot", {"model": learner}, mesh=program.mesh,
                    train=TrainConfig(batch=program.batch, seq_len=program.seq_len))  # fmt: skip
    mesh = make_mesh(cfg.mesh, devices_of(program.devices))
    check_fits(cfg, mesh)
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
    parser.add_argument("program", nargs="?", choices=PROGRAMS | MORE)
    parser.add_argument("--layers", type=int, help="in place of the model's own number")
    parser.add_argument("--remat")
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--attention")
    parser.add_argument("--offload", action="store_true", default=None)
    parser.add_argument("--reduce-dtype", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    if args.program is None:
        for name, p in (PROGRAMS | MORE).items():
            print(f"{name}: {p.model}, {p.batch} x {p.seq_len} on {p.devices}")
        return
    how = {name: value for name, value in vars(args).items() if value is not None and name not in ("program", "layers")}
    print(json.dumps(dict(program=args.program) | compile_program((PROGRAMS | MORE)[args.program], args.layers, **how)))
    sys.stdout.flush()
    os._exit(0)  # libtpu's threads do not always end


if __name__ == "__main__":
    main()
