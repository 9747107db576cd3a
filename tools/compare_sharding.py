"""Two ways to write sharding, on the same model, loss and batch: are they equal, and what does each cost?

(a) `shard_map`: what the project uses. One `shard_map` around embed -> blocks -> loss; collectives are calls.
(b) `explicit`: the program of this file. Global arrays on a mesh of Explicit axes; every array's type carries its
    sharding, weights are resharded to their compute form block by block, and collectives follow from the types.
    The experts' dispatch (a sort of each device's own tokens) stays an island of `shard_map`.

    python tools/compare_sharding.py cpu            # a tiny Scout on 8 CPU devices: equal to 1e-5, and what each costs
    python tools/compare_sharding.py tpu explicit   # Scout's width, compiled for 64 TPUs: needs libtpu, no TPU

The findings stand in docs/decisions.md. Letters beyond the legend of `llama4_jax/axes.py`: X context shards.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from data.batch import DTYPES, Batch
from llama4_jax import moe
from llama4_jax.attention import Attention
from llama4_jax.axes import BATCH_AXES, CONTEXT, MESH_AXES, TENSOR, TOKEN_AXES, Execution, map_params
from llama4_jax.config import ModelConfig, scout, tiny_scout
from llama4_jax.kernels.attention import reference
from llama4_jax.kernels.vocab_loss.api import CHUNK
from llama4_jax.layers import SwiGLU
from llama4_jax.moe import MoE, RouterStats, router_losses
from llama4_jax.text import Layer, Transformer
from training.config import Learner, MeshConfig
from training.mesh import BATCH_SPEC, make_mesh, shardings
from training.state import execution, graphdef
from training.step import gradient

# ---- Form (b). Types of the arrays: where they lie, over what they still have to be summed (`unreduced`), and over
# what the gradient of a copy will have to be (`reduced`).
TOKENS = frozenset(TOKEN_AXES)
X = P(BATCH_AXES, CONTEXT, None)
X_COPIED = P(BATCH_AXES, CONTEXT, None, reduced=frozenset({TENSOR}))  # into column-split weights
X_SHARES = P(BATCH_AXES, CONTEXT, None, unreduced=frozenset({TENSOR}))  # out of row-split weights


def used_spec(run: Execution, p: nnx.Param) -> P:
    """A weight in its compute form: split over `tensor` alone, its gradient's sum over tokens still to be taken.

    Norm scales enter an elementwise product, which takes no `reduced` operand: their gradients come back summed.
    """
    dims = [TENSOR if TENSOR in names else None for names in run.stored_over(p.axes, len(p.axes))]
    return P(*dims, reduced=TOKENS if len(dims) > 1 else frozenset())


def fetch(run: Execution, module: Any) -> Any:
    """`Execution.fetch_module`, by types: the gather is a reshard, the reduce-scatter its transpose."""

    def one(p: nnx.Param) -> nnx.Variable:
        dtype = jnp.float32 if p.fp32 else jnp.dtype(run.compute_dtype)
        stored = run.spec(p.axes, len(p.axes))

        @jax.custom_vjp
        def gather(w):
            return reshard(w.astype(dtype), used_spec(run, p))

        def transpose(_, g):
            return (reshard(g.astype(run.reduce_dtype), stored).astype(jnp.float32),)

        gather.defvjp(lambda w: (gather(w), None), transpose)
        return p.replace(gather(p.get_value()))

    graph, state = nnx.split(module)
    return nnx.merge(graph, map_params(one, state))


def swiglu(ffn: SwiGLU, x_BTD):
    h_BTF = jax.nn.silu(x_BTD @ ffn.wi_gate_DF[...]) * (x_BTD @ ffn.wi_up_DF[...])
    return jnp.einsum("BTF,FD->BTD", h_BTF, ffn.wo_FD[...], out_sharding=X_SHARES)


def attend(attention: Attention, x_BTD, positions_BT, segment_ids_BT):
    q_BTNH, k_BTKH, v_BTKH = attention.project(x_BTD, positions_BT)
    B, T, N, H = q_BTNH.shape
    if attention.local:  # chunks become a dimension of their own, split over `context`
        chunk = min(attention.cfg.chunk, T)
        assert (T // chunk) % jax.sharding.get_abstract_mesh().shape[CONTEXT] == 0, "a context shard cuts a chunk"
        shape, spec = (B, T // chunk, chunk), P(BATCH_AXES, CONTEXT, None, TENSOR, None)
        q, k, v = (jnp.reshape(x, (*shape, *x.shape[2:]), out_sharding=spec) for x in (q_BTNH, k_BTKH, v_BTKH))
        segments = jnp.reshape(segment_ids_BT, shape, out_sharding=P(BATCH_AXES, CONTEXT, None))
        out = jax.vmap(reference.attention, 1, 1)(q, k, v, segments, segments)
        out_BTNH = jnp.reshape(out, (B, T, N, H), out_sharding=P(BATCH_AXES, CONTEXT, TENSOR, None))
    else:
        k_BSKH, v_BSKH = (reshard(x, P(BATCH_AXES, None, TENSOR, None)) for x in (k_BTKH, v_BTKH))
        segment_ids_BS = reshard(segment_ids_BT, P(BATCH_AXES, None))
        out_BTNH = reference.attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, segment_ids_BS)
    return jnp.einsum("BTNH,NHD->BTD", out_BTNH, attention.wo_NHD[...], out_sharding=X_SHARES)


def mixture(run: Execution, layer: MoE, x_BTD, valid_BT):
    logits_BTE = x_BTD.astype(jnp.float32) @ layer.router_DE[...]
    z_BTA, chosen_BTA = jax.lax.top_k(logits_BTE, layer.cfg.experts_per_token)
    one_hot_BTE = jax.nn.one_hot(chosen_BTA, layer.cfg.num_experts, dtype=jnp.float32).sum(axis=2)
    stats = RouterStats(
        load=jnp.sum(valid_BT[..., None] * one_hot_BTE, axis=(0, 1)),
        probability=jnp.sum(valid_BT[..., None] * jax.nn.softmax(logits_BTE), axis=(0, 1)),
        z=jnp.sum(valid_BT * jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
        tokens=jnp.sum(valid_BT),
    )
    graph, experts = nnx.split(layer.experts)

    def island(x_BTD, gate_BTA, chosen_BTA, experts):  # this device's tokens
        # A gather takes no `reduced` operand: from here on the copies are each device's own.
        x_BTD, gate_BTA = (jax.lax.pcast(x, TENSOR, to="varying") for x in (x_BTD, gate_BTA))
        experts = jax.tree.map(lambda w: jax.lax.pcast(w, TOKEN_AXES, to="varying"), experts)
        device: Any = SimpleNamespace(cfg=layer.cfg, experts=nnx.merge(graph, experts))
        y_RD = MoE._dispatch(device, *(a.reshape(-1, a.shape[-1]) for a in (x_BTD, gate_BTA, chosen_BTA)))
        return y_RD.reshape(x_BTD.shape)

    specs = map_params(lambda p: p.replace(used_spec(run, p)), experts)
    dispatch = jax.shard_map(island, in_specs=(X_COPIED, X_COPIED, X, specs), out_specs=X_SHARES)
    x_BTD, gate_BTA = (reshard(x, X_COPIED) for x in (x_BTD, jax.nn.sigmoid(z_BTA)))
    return dispatch(x_BTD, gate_BTA, chosen_BTA, experts) + swiglu(layer.shared, x_BTD), stats


def run_layer(run: Execution, layer: Layer, x_BTD, batch: Batch):
    layer = fetch(run, layer)
    assert isinstance(layer.ffn, MoE)
    y_BTD = reshard(layer.attention_norm(x_BTD), X_COPIED)
    x_BTD += reshard(attend(layer.attention, y_BTD, batch.positions, batch.segment_ids), X)
    y_BTD, stats = mixture(run, layer.ffn, layer.ffn_norm(x_BTD), (batch.segment_ids > 0).astype(jnp.float32))
    return x_BTD + reshard(y_BTD, X), stats


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h_BTD, w_DV, labels_BT, mask_BT, rows: int):
    """`kernels/vocab_loss`, by types: sum of m_i CE_i, the gradients computed in the forward pass."""
    return _cross_entropy(h_BTD, w_DV, labels_BT, mask_BT, rows)[0]


def _cross_entropy(h_BTD, w_DV, labels_BT, mask_BT, rows: int):
    mesh = jax.sharding.get_abstract_mesh()
    B, T = labels_BT.shape
    parts, local = mesh.shape[CONTEXT], B // int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    step_T = min(max(rows // local, 1), T // parts)

    def cut(x):  # [B, T, ...] -> [steps, B, X, T / (X steps), ...]
        spec = P(BATCH_AXES, CONTEXT, *[None] * x.ndim)
        return jnp.moveaxis(jnp.reshape(x, (B, parts, -1, step_T, *x.shape[2:]), out_sharding=spec), 2, 0)

    def step(dw_DV, x):
        h_BXTD, labels_BXT, mask_BXT = x
        z_BXTV = jnp.einsum("BXTD,DV->BXTV", h_BXTD, w_DV, preferred_element_type=jnp.float32)
        lse_BXT = jax.nn.logsumexp(z_BXTV, axis=-1)
        column = jax.lax.broadcasted_iota(jnp.int32, z_BXTV.shape, 3, out_sharding=jax.typeof(z_BXTV).sharding)
        is_label_BXTV = column == labels_BXT[..., None]
        ce_BXT = lse_BXT - jnp.sum(jnp.where(is_label_BXTV, z_BXTV, 0.0), axis=-1)
        dz_BXTV = mask_BXT[..., None] * (jnp.exp(z_BXTV - lse_BXT[..., None]) - is_label_BXTV)
        dz_BXTV = dz_BXTV.astype(h_BXTD.dtype)
        dw_DV += jnp.einsum(
            "BXTD,BXTV->DV", h_BXTD, dz_BXTV, preferred_element_type=jnp.float32, out_sharding=shares_DV
        )
        shares_BXTD = P(BATCH_AXES, CONTEXT, None, None, unreduced=frozenset({TENSOR}))
        return dw_DV, (mask_BXT * ce_BXT, jnp.einsum("BXTV,DV->BXTD", dz_BXTV, w_DV, out_sharding=shares_BXTD))

    shares_DV = P(None, TENSOR, unreduced=TOKENS)
    dw_DV = jnp.zeros(w_DV.shape, jnp.float32, out_sharding=shares_DV)
    dw_DV, (ce, dh) = jax.lax.scan(step, dw_DV, jax.tree.map(cut, (h_BTD, labels_BT, mask_BT)))
    dh = reshard(dh, P(None, BATCH_AXES, CONTEXT, None, None))  # reshape takes no `unreduced`: sum before it
    return jnp.sum(ce), (jnp.reshape(jnp.moveaxis(dh, 0, 2), h_BTD.shape, out_sharding=X), dw_DV)


def _cross_entropy_backward(rows, gradients, g):
    dh_BTD, dw_DV = gradients
    dw_DV *= reshard(g, P(reduced=TOKENS))  # the only factor that a sum still to be taken may get
    return (dh_BTD * g).astype(dh_BTD.dtype), dw_DV.astype(dh_BTD.dtype), None, None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)


def explicit_loss(learner: Learner, params: nnx.State, batch: Batch) -> jax.Array:
    """Mean cross-entropy and the router's losses of the global batch, from global arrays."""
    run, model = execution(learner), nnx.merge(graphdef(learner), params)
    x_BTD = fetch(run, model.embedding).table_VD[...].at[batch.tokens].get(out_sharding=X)
    graph, stacked = nnx.split(model.blocks)

    def run_block(x_BTD, stored):
        all_stats = []
        for layer in nnx.merge(graph, stored).layers:
            x_BTD, stats = run_layer(run, layer, x_BTD, batch)
            all_stats.append(stats)
        return x_BTD, jax.tree.map(lambda *s: jnp.stack(s), *all_stats)

    x_BTD, stats = jax.lax.scan(jax.checkpoint(run_block, prevent_cse=False), x_BTD, stacked)
    stats = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)
    h_BTD = fetch(run, model.final_norm)(x_BTD)
    w_DV = fetch(run, model.unembedding).kernel_DV[...]
    ce = cross_entropy(h_BTD, w_DV, batch.labels, batch.loss_mask, CHUNK)
    balance, z, _ = router_losses(stats, learner.model.experts_per_token)
    return ce / batch.loss_mask.sum() + learner.router_balance * balance + learner.router_z * z


# ---- The two programs, ready to compile: (params, batch) -> (loss, gradients, stored like the parameters).
def program(form: str, learner: Learner, mesh: Mesh) -> Any:
    if form == "explicit":
        return jax.jit(jax.value_and_grad(partial(explicit_loss, learner)))

    def step(params: nnx.State, batch: Batch):
        grads, sums, _ = gradient(learner, mesh, 1)(params, batch, (jnp.float32(1), jnp.float32(0)))
        loss = sums.domain_ce.sum() + learner.router_balance * sums.balance + learner.router_z * sums.z
        return loss / sums.tokens, grads

    return jax.jit(step)


def mesh_of(form: str, sizes: MeshConfig, devices: list[Any]) -> Mesh:
    mesh = make_mesh(sizes, devices)
    return mesh if form == "shard_map" else Mesh(mesh.devices, MESH_AXES, (AxisType.Explicit,) * len(MESH_AXES))


def placed(learner: Learner, mesh: Mesh, rows: int, seq_len: int) -> tuple[nnx.State, Batch]:
    """Shapes, dtypes and places of the inputs."""
    params = nnx.split(nnx.eval_shape(lambda: Transformer(learner.model, nnx.Rngs(0))))[1]
    places = shardings(mesh, execution(learner).specs(params))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)
    place = NamedSharding(mesh, BATCH_SPEC)
    fields = {name: jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=place) for name, dtype in DTYPES.items()}
    return params, Batch(**fields)  # pyright: ignore


def random_inputs(learner: Learner, rows: int, seq_len: int) -> tuple[nnx.State, Batch]:
    """Weights, and rows of two documents with padding behind them, chunk-aligned."""
    params = nnx.split(Transformer(learner.model, nnx.Rngs(0)))[1]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, learner.model.vocab_size, (rows, seq_len + 1), dtype=np.int32)
    place = np.arange(seq_len, dtype=np.int32)
    cut, end = seq_len // 2, seq_len - seq_len // 8
    row = dict(segment_ids=(place < end) * (1 + (place >= cut)), positions=place % cut, loss_mask=place < end,
               domain=0 * place, first_visit=place >= 0, document_id=place // cut)  # fmt: skip
    row = {name: np.broadcast_to(x, (rows, seq_len)).astype(DTYPES[name]) for name, x in row.items()}
    return params, Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], **row)


# ---- What a compiled program costs.
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8)


def array_bytes(hlo_type: str) -> list[int]:
    """Bytes of each array of an HLO type."""
    found = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", hlo_type)
    return [BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in found]


def collectives(hlo: str) -> Counter[tuple[str, str]]:
    """{(kind, "calls" or "bytes"): what a device does in a run}, loops multiplied out.

    Bytes are those of whole arrays: as gathered, or as before the scatter.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        lines.append(line)

    def trips(line: str) -> int:
        """Of a loop: as XLA notes it, or the bound in its condition (the TPU compiler notes nothing)."""
        if known := re.search(r'"known_trip_count":{"n":"(\d+)"', line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", line)
        bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition[1]])) if condition else []
        assert len(bounds) == 1, f"unknown trip count: {line}"
        return int(bounds[0])

    def count(body: str) -> Counter[tuple[str, str]]:
        total: Counter[tuple[str, str]] = Counter()
        sizes: dict[str, int] = {}
        for line in bodies[body]:
            if not (op := re.match(r"\s+(?:ROOT )?(%?\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)):
                continue
            name, hlo_type, kind, operands = op.groups()
            started = kind.endswith("-start")  # its result holds its operands too
            sizes[name] = max(array_bytes(hlo_type), default=0) if started else sum(array_bytes(hlo_type))
            if (kind := kind.removesuffix("-start")) in KINDS.split("|"):
                total[kind, "calls"] += 1
                total[kind, "bytes"] += max(sizes[name], sum(sizes.get(x, 0) for x in operands.split(", ")))
            for called in re.findall(r"\b(?:body|calls|to_apply)=%?([\w.-]+)", line):
                for key, value in count(called).items():
                    total[key] += value * (trips(line) if kind == "while" else 1)
        return total

    return count("ENTRY")


def compile_and_report(form: str, learner: Learner, mesh: Mesh, rows: int, seq_len: int) -> Any:
    """Compile one form, print what that and the program cost, and return the program."""
    inputs = placed(learner, mesh, rows, seq_len)
    with jax.set_mesh(mesh) if form == "explicit" else contextlib.nullcontext():
        wall, cpu = time.perf_counter(), time.process_time()
        lowered = program(form, learner, mesh).lower(*inputs)
        traced = time.perf_counter() - wall
        compiled = lowered.compile()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = compiled.memory_analysis()
    arguments, temporary = (x / 2**30 for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    print(f"{form}, {shape}: trace {traced:.1f} s, with compile {wall:.1f} s ({cpu:.1f} CPU seconds); "
          f"GiB a device: arguments {arguments:.3f}, temporaries {temporary:.3f}")  # fmt: skip
    done = collectives(compiled.as_text())
    for kind in sorted({kind for kind, _ in done}):
        print(f"    {kind}: {done[kind, 'calls']} calls, {done[kind, 'bytes'] / 2**20:.2f} MiB")
    return compiled


def four_layers(cfg: ModelConfig) -> ModelConfig:
    """Two blocks of a local and a global layer: with one block the loop, and with it the recomputation, is removed."""
    return replace(cfg, num_layers=4, nope_every=2)


def on_cpu() -> None:
    """Both forms of a tiny Scout in fp32: the same loss and gradients, and their costs."""
    jax.config.update("jax_num_cpu_devices", 8)
    learner = Learner(four_layers(tiny_scout()), compute_dtype="float32")
    params, batch = random_inputs(learner, rows=8, seq_len=256)
    for sizes in (MeshConfig(fsdp=8), MeshConfig(context=2, tensor=2, fsdp=2)):
        results = []
        for form in ("shard_map", "explicit"):
            mesh = mesh_of(form, sizes, jax.devices())
            compiled = compile_and_report(form, learner, mesh, *batch.tokens.shape)
            places = jax.tree.map(lambda x: x.sharding, placed(learner, mesh, *batch.tokens.shape))
            results.append(jax.device_get(jax.tree.leaves(compiled(*jax.device_put((params, batch), places)))))
        worst = max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in zip(*results, strict=True))
        print(f"loss {results[0][0]:.6f} and {results[1][0]:.6f}; largest relative difference of an array {worst:.1e}")
        assert worst < 1e-5


def for_tpu(form: str, topology: str) -> None:
    """One form at Scout's width in bf16, a sequence of 4,096 tokens a chip, fully sharded."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    moe.default_backend = lambda: "ragged_dot"  # the process itself runs on CPU
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    learner = Learner(four_layers(scout()))
    compile_and_report(form, learner, mesh_of(form, MeshConfig(), list(devices)), len(devices), 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = parser.add_subparsers(dest="where", required=True)
    where.add_parser("cpu")
    tpu = where.add_parser("tpu")
    tpu.add_argument("form", choices=("shard_map", "explicit"))
    tpu.add_argument("--topology", default="v5p:4x4x4")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.where == "cpu":
        on_cpu()
    else:
        for_tpu(args.form, args.topology)


if __name__ == "__main__":
    main()
