"""The distillation loss at full size, compiled for TPUs that are not here: what it holds, fused and naive.

    python -m tools.compile_loss                 # Scout (width 5,120) from Behemoth (16,384), 32,768 tokens a device

Value and gradient of h CE + s KL over a vocabulary of 202,048, hidden states and heads in bf16, on one v5p with the
vocabulary whole and on eight with the vocabulary split; the naive form where it is whole, on fewer tokens, too. Needs
the extra `tpu` (libtpu, no TPU). Prints JSON lines, in GiB a device, and what a chunk's size costs: dW is read and
written in fp32 once for each.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

GIB = 2**30
VOCABULARY, WIDTH, TEACHER = 202_048, 5_120, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of a device")
    parser.add_argument("--chunk", type=int, help="rows at a time; default: what the loss takes by itself")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 1], help="over which the vocabulary is split")
    args = parser.parse_args()
    from training.ahead import no_device_needed

    no_device_needed()
    for devices in args.devices:
        print(json.dumps(compiled("fused", args.tokens, args.chunk, devices)), flush=True)
    for tokens in (args.tokens, args.tokens // 4, args.tokens // 16):
        print(json.dumps(compiled("naive", tokens, args.chunk, 1)), flush=True)


def compiled(how: str, tokens: int, chunk: int | None, devices: int) -> dict[str, Any]:
    """What the program holds on a device of `devices`, each with all `tokens` and its share of the vocabulary."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from llama4_jax.kernels.vocab_loss import api, reference
    from llama4_jax.kernels.vocab_loss.comparison import Comparison, Dense
    from training.ahead import devices_of
    from training.chips import CHIPS

    chunk = chunk or api.default_chunk(VOCABULARY // devices, live_teacher=True)
    mesh = jax.sharding.Mesh(np.array(devices_of("v5p:2x2x2")[:devices]), ("tensor",))
    rows, columns = P(), P(None, "tensor")

    def local(h, w, labels, hard, soft, hidden, unembedding):
        split = dict(columns=("tensor",), chunk=chunk) if how == "fused" else {}
        loss = partial(api.vocab_loss if how == "fused" else reference.vocab_loss, **split)

        def total(h, w):
            return loss(h, w, labels, hard, soft, Dense(hidden, unembedding), Comparison(measure=True))

        return jax.value_and_grad(total, (0, 1), has_aux=True)(h, w)

    def shape(spec, *sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    row = shape(rows, tokens, dtype=jnp.float32)
    args = (shape(rows, tokens, WIDTH), shape(columns, WIDTH, VOCABULARY), shape(rows, tokens, dtype=jnp.int32),
            row, row, shape(rows, tokens, TEACHER), shape(columns, TEACHER, VOCABULARY))  # fmt: skip
    specs = (rows, columns, rows, rows, rows, rows, columns)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=((rows, rows), (rows, columns)), check_vma=False)
    try:
        m: Any = jax.jit(mapped).lower(*args).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # more than a chip has
        return dict(how=how, tokens=tokens, devices=devices, refused=str(error).splitlines()[0])
    hidden = 2 * tokens * (WIDTH + TEACHER)  # and dL/dh, which is as large as the student's
    heads = 2 * VOCABULARY * (WIDTH + TEACHER) // devices
    chip = CHIPS["v5p"]
    gradient = 4 * WIDTH * VOCABULARY // devices
    flops = 2 * tokens * VOCABULARY * (3 * WIDTH + TEACHER) // devices
    total = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
    return dict(
        how=how, tokens=tokens, devices=devices, chunk=chunk if how == "fused" else None,
        arguments=m.argument_size_in_bytes / GIB, temporaries=m.temp_size_in_bytes / GIB,
        outputs=m.output_size_in_bytes / GIB, hidden_states=hidden / GIB, heads=heads / GIB,
        head_gradient_fp32=gradient / GIB,
        without_hidden_states=(total - hidden - 2 * tokens * WIDTH) / GIB,
        temporaries_beyond_head_gradient=(m.temp_size_in_bytes - gradient) / GIB,
        matmul_seconds=flops / chip.bf16, dw_traffic_seconds=2 * gradient * (tokens // chunk) / chip.hbm_rate,
    )  # fmt: skip


if __name__ == "__main__":
    main()
