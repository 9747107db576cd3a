"""Times of the kernels alone, at Scout's widths, on the device that is here (docs/performance.md shows an H200's).

    python -m tools.bench_kernels                                   # on a GPU; --parts attention grouped loss quant
    python -m tools.bench_kernels --small --attention blockwise --grouped blocks    # whether it runs, on a CPU

Prints a line of JSON for each: ms (median of three rounds of calls under way at once), TFLOP/s of the work that counts
(causal attention within documents; rows that exist), MiB of temporaries and seconds to compile. Inputs are random.
What a kernel cannot do is a line, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax import quant
from llama4_jax.config import scout
from llama4_jax.kernels.attention.api import attention
from llama4_jax.kernels.grouped_matmul.api import group_multiple, grouped_matmul
from llama4_jax.kernels.vocab_loss.api import vocab_loss

CALLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--attention", nargs="+", default=["mosaic_gpu", "cudnn"], metavar="BACKEND")
    parser.add_argument("--grouped", nargs="+", default=["triton"], metavar="BACKEND")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1024, 2048], help="of the loss")
    parser.add_argument("--small", action="store_true", help="an eighth of each width, few rows")
    args = parser.parse_args()
    args.cut = 8 if args.small else 1
    for part in args.parts:
        PARTS[part](args)


def matmul(args: argparse.Namespace) -> None:
    n = 8192 // args.cut
    report(f"matmul of {n}^3", 2 * n**3, lambda a, b: a @ b, random(0, n, n), random(1, n, n))


def of_attention(args: argparse.Namespace) -> None:
    model, rng = scout(), np.random.default_rng(0)
    N, K, H = model.num_heads, model.num_kv_heads, model.head_dim
    for B, T, documents in ((1, 8192, 1), (1, 8192, 12), (4, 8192, 1), (1, 32_768, 1)):
        T //= args.cut**2
        q, k, v = random(2, B, T, N, H), random(3, B, T, K, H), random(4, B, T, K, H)
        cuts = np.sort(rng.choice(np.arange(1, T), documents - 1, replace=False))
        number = np.searchsorted(cuts, np.arange(T), side="right") + 1
        segments = jnp.asarray(np.broadcast_to(number, (B, T)).astype(np.int32))
        flops = 2.0 * B * N * H * float(np.sum(np.diff([0, *cuts, T]).astype(float) ** 2))
        for backend in args.attention:
            f = partial(lambda q, k, v, s, backend: attention(q, k, v, s, s, backend=backend), backend=backend)
            what = f"attention {backend}, {B} x {T}, {documents} documents"
            forward_and_backward(what, flops, 3.5 * flops, f, (q, k, v), segments, cotangent=q)


def grouped(args: argparse.Namespace) -> None:
    model, R = scout(), 16_384 // args.cut
    E, D, F = model.num_experts, model.embed_dim // args.cut, model.expert_dim // args.cut
    for a, b in ((D, 2 * F), (F, D)):
        x, w, g = random(5, R, a), random(6, E, a, b), random(7, R, b)
        flops = 2.0 * R * a * b
        for backend in args.grouped:
            sizes = np.random.default_rng(0).multinomial(R, np.ones(E) / E)
            some = jnp.asarray(sizes // group_multiple(backend) * group_multiple(backend), jnp.int32)
            f = partial(lambda x, w, sizes, backend: grouped_matmul(x, w, sizes, backend), backend=backend)
            what = f"grouped matmul {backend}, {R} x {a} x {b}"
            forward_and_backward(what, flops, 3 * flops, f, (x, w), some, cotangent=g)
        equal = x.reshape(E, -1, a), w
        f = partial(jnp.einsum, "ECD,EDF->ECF")
        what = f"einsum of equal groups, {R} x {a} x {b}"
        forward_and_backward(what, flops, 3 * flops, f, equal, cotangent=g.reshape(E, -1, b))


def loss(args: argparse.Namespace) -> None:
    model = scout()
    R, D, V = 8192 // args.cut, model.embed_dim // args.cut, model.vocab_size // args.cut
    h, w, hard = random(8, R, D), random(9, D, V), jnp.ones(R, jnp.float32)
    labels = jax.random.randint(jax.random.key(10), (R,), 0, V)
    for chunk in args.chunks:
        f = partial(lambda h, w, chunk: vocab_loss(h, w, labels, hard, chunk=chunk)[0], chunk=min(chunk, R))
        report(f"loss by {chunk}, {R} x {D} x {V}, gradient", 6.0 * R * D * V, jax.value_and_grad(f, (0, 1)), h, w)


def quantised(args: argparse.Namespace) -> None:
    R, D, F = (n // args.cut for n in (16_384, scout().embed_dim, 2 * scout().expert_dim))
    x, w, g = random(11, R, D), random(12, D, F), random(13, R, F)
    for kind in ("none", "fp8"):
        f = partial(lambda x, w, kind: quant.einsum("TD,DF->TF", x, w, kind), kind=kind)
        what = f"{'bf16' if kind == 'none' else kind}, {R} x {D} x {F}"
        forward_and_backward(what, 2.0 * R * D * F, 6.0 * R * D * F, f, (x, w), cotangent=g)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "matmul": matmul, "attention": of_attention, "grouped": grouped, "loss": loss, "quant": quantised,
}  # fmt: skip


def random(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)


def forward_and_backward(
    what: str, flops: float, with_backward: float, f: Callable[..., jax.Array], by: tuple, *others: Any, cotangent: Any
) -> None:
    """f(*by, *others), and the same with its gradients by `by`."""

    def both(cotangent: jax.Array, *by: jax.Array):
        out, vjp = jax.vjp(lambda *by: f(*by, *others), *by)
        return out, vjp(cotangent)

    report(f"{what}, forward", flops, f, *by, *others)
    report(f"{what}, with backward", with_backward, both, cotangent, *by)


def report(what: str, flops: float, f: Callable[..., Any], *arguments: Any) -> None:
    try:
        began = time.perf_counter()
        call = jax.jit(f).lower(*arguments).compile()
        compiled = time.perf_counter() - began
        jax.block_until_ready(call(*arguments))
        rounds = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(CALLS):
                out = call(*arguments)
            jax.block_until_ready(out)
            rounds.append((time.perf_counter() - began) / CALLS)
    except (ValueError, ImportError, jax.errors.JaxRuntimeError) as error:
        print(json.dumps(dict(what=what, failed=" ".join(str(error).split())[:200])), flush=True)
        return
    seconds, memory = statistics.median(rounds), call.memory_analysis()
    temporaries = memory.temp_size_in_bytes / 2**20 if memory else None
    print(json.dumps(dict(what=what, ms=1e3 * seconds, tflops=flops / seconds / 1e12, temporaries_mib=temporaries,
                          compile_seconds=compiled)), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
