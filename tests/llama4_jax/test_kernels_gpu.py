"""The GPU backends: what they hand to the kernels, on CPU, with stand-ins for kernels that have no CPU form; that they
compile for an H100, where jax's CUDA plugin is installed; and their numbers, where there is a GPU:

    JAX_PLATFORMS=cuda python -m pytest tests/llama4_jax/test_kernels_gpu.py
"""

from __future__ import annotations

import importlib.util
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_calls

from llama4_jax.kernels.attention import cudnn, mosaic_gpu, reference
from llama4_jax.kernels.grouped_matmul import triton

pytestmark = [
    pytest.mark.filterwarnings("ignore:The out_shape and scratch_shapes:DeprecationWarning"),  # tokamax's
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="numbers of GPU kernels need a GPU")
off_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="stand-ins and interpreters are for CPUs")
needs_tokamax = pytest.mark.skipif(not importlib.util.find_spec("tokamax"), reason="needs tokamax")


def packed(rng, rows: int, length: int, most: int = 9) -> np.ndarray:
    """Segments of rows: runs of random lengths, numbered along the row, some of them padding (0)."""
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, length), rng.integers(0, most), replace=False))
        for number, piece in enumerate(np.split(row, cuts), start=1):
            piece[:] = 0 if rng.random() < 0.2 else number
        row[: cuts[0] if len(cuts) else None] = 1
    return segments


def runs(row: np.ndarray) -> list[tuple[int, int]]:
    cuts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return list(pairwise(cuts))


def attention_inputs(T: int, S: int, dtype=jnp.bfloat16, B=2, N=4, K=2, H=32):
    """q, k, v, both segments, positions (None for whole rows), the output's cotangent (0 for padding)."""
    rng = np.random.default_rng(T + S)
    q, g = (jnp.asarray(rng.normal(size=(B, T, N, H)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(B, S, K, H)), dtype) for _ in range(2))
    kv_segments = packed(rng, B, S)
    half = T // 2  # as mirroring leaves them: an early part and a late one
    positions = None if T == S else np.concatenate([8 + np.arange(half), S - (T - half) + np.arange(T - half)])
    q_segments = kv_segments if positions is None else kv_segments[:, positions]
    g = jnp.where((q_segments > 0)[:, :, None, None], g, 0)
    return q, k, v, jnp.asarray(q_segments), jnp.asarray(kv_segments), positions, g


def value_and_grads(attend, inputs, dtype=jnp.bfloat16):
    """Output where the query is not padding, and gradients, in fp32, having computed in `dtype`."""
    q, k, v, q_segments, kv_segments, positions, g = inputs
    positions = None if positions is None else jnp.asarray(positions)

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, q_segments, kv_segments, positions), q, k, v)
        return jnp.where((q_segments > 0)[:, :, None, None], out, 0), *vjp(g)

    return [np.asarray(x, np.float32) for x in run(*(x.astype(dtype) for x in (q, k, v, g)))]


def assert_as_exact_as_the_reference(attend, inputs):
    """At most twice the error that the reference makes in bfloat16, measured against it in fp32."""
    exact = value_and_grads(reference.attention, inputs, jnp.float32)
    rounded = value_and_grads(reference.attention, inputs)
    every = zip(("out", "dq", "dk", "dv"), value_and_grads(attend, inputs), rounded, exact, strict=True)
    for name, got, like, want in every:
        allowed = 2 * np.abs(like - want).max()
        assert np.abs(got - want).max() <= allowed, f"{name}: {np.abs(got - want).max()} above {allowed}"


SHAPES = {"whole rows": (256, 256), "whole rows, padded": (150, 150), "a part of a row": (140, 300)}


# What the kernels are given.


@pytest.mark.parametrize("shape", SHAPES)
def test_key_ranges_are_the_keys_of_the_run_up_to_the_query(shape):
    *_, kv_segments, positions, _ = attention_inputs(*SHAPES[shape])
    starts, ends = mosaic_gpu.key_ranges(kv_segments, None if positions is None else jnp.asarray(positions))
    assert (ends is None) == (positions is None)
    for row, starts_T in zip(np.asarray(kv_segments), np.asarray(starts), strict=True):
        for t, p in enumerate(range(len(row)) if positions is None else positions):
            keys = [s for s in range(p + 1) if len(set(row[s : p + 1])) == 1]
            assert (starts_T[t], p + 1 if ends is None else ends[t]) == (min(keys), p + 1)


def test_documents_are_the_runs_of_a_row():
    segments = packed(np.random.default_rng(0), rows=6, length=40)
    starts, lengths, fits = map(np.asarray, cudnn.documents(jnp.asarray(segments), 5))
    assert 0 < fits.sum() < 6
    for row, starts_M, lengths_M, fit in zip(segments, starts, lengths, fits, strict=True):
        want = [(a, b - a) for a, b in runs(row)]
        assert fit == (len(want) <= 5)
        got = [(a, n) for a, n in zip(starts_M, lengths_M, strict=True) if a >= 0]
        assert got == want[:5] and all(lengths_M[len(got) :] == -1)


@pytest.mark.parametrize("sizes", [(140, 0, 200, 0, 6), (0, 0, 400), (128, 128, 144), (0, 0)])
def test_row_tiles_take_every_row_once(sizes):
    rows = 400
    groups = np.repeat(np.arange(len(sizes) + 1), (*sizes, rows - sum(sizes)))
    taken = np.zeros(rows, int)
    for group, first, end in zip(*map(np.asarray, triton.row_tiles(jnp.asarray(sizes), rows)), strict=True):
        mine = np.arange(first, min(first + triton.ROWS_TILE, end))
        taken[mine] += 1
        assert all(groups[mine] == group)
    assert all(taken == 1)


# Around the kernels.


def stand_in(module: str) -> SimpleNamespace:
    """tokamax's module of Hopper kernels, forward or backward, by its contract and in plain jax.numpy."""

    def scores(q, k, starts, ends, is_causal, logits_scale):
        assert q.shape[0] % mosaic_gpu.BLOCK == k.shape[0] % mosaic_gpu.BLOCK == 0
        key, query = jnp.arange(k.shape[0])[None, None], jnp.arange(q.shape[0])[None, :, None]
        visible = (key >= starts[..., None]) & ((key <= query) if is_causal else (key < ends[..., None]))
        return jnp.where(visible, jnp.einsum("qnh,knh->nqk", q, k) * logits_scale, -1e30)

    def for_each_query_head(q, *keys_or_values):
        return (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1).astype(jnp.float32) for x in keys_or_values)

    def forward(q, k, v, bias, mask, starts, ends, *, is_causal, logits_scale, out_dtype, **_):
        assert bias is mask is None
        k, v = for_each_query_head(q, k, v)
        s = scores(q, k, starts, ends, is_causal, logits_scale)
        out = jnp.einsum("nqk,knh->qnh", jax.nn.softmax(s), v)
        return out.astype(out_dtype), (s.max(-1), jnp.exp(s - s.max(-1, keepdims=True)).sum(-1))

    def backward(q, k, v, softmax, out, dout, bias, mask, starts, ends, *, is_causal, logits_scale, **_):
        assert bias is mask is None
        heads, dtype = k.shape[1], q.dtype
        k, v = for_each_query_head(q, k, v)
        q, out, dout = (x.astype(jnp.float32) for x in (q, out, dout))
        most, total = (x[..., None] for x in softmax)
        p = jnp.exp(scores(q, k, starts, ends, is_causal, logits_scale) - most) / total
        dp = jnp.einsum("qnh,knh->nqk", dout, v) - jnp.einsum("qnh,qnh->nq", dout, out)[..., None]
        ds = p * dp * logits_scale
        dk, dv = jnp.einsum("nqk,qnh->knh", ds, q), jnp.einsum("nqk,qnh->knh", p, dout)
        dk, dv = (x.reshape(x.shape[0], heads, -1, x.shape[2]).sum(2) for x in (dk, dv))
        return *(x.astype(dtype) for x in (jnp.einsum("nqk,knh->qnh", ds, k), dk, dv)), None

    return SimpleNamespace(flash_attention_kernel=forward, flash_attention_vjp_kernel=backward, Config=SimpleNamespace)


@off_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_mosaic_is_the_reference_if_its_kernels_keep_their_contract(shape, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "vendor", stand_in)
    assert_as_exact_as_the_reference(mosaic_gpu.attention, attention_inputs(*SHAPES[shape]))


def packed_stand_in(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """jax's packed call of cuDNN by its contract: causal within each document of the lists, garbage elsewhere."""
    assert mask_type == cudnn_calls.MaskType.PADDING_CAUSAL and q.shape == k.shape
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    position = jnp.arange(q.shape[1])[None, None]
    within = (position >= q_offsets[:, :-1, None]) & (position < (q_offsets[:, :-1] + q_seqlen)[..., None])
    number = jnp.where(within.any(1), jnp.argmax(within, 1) + 1, 0)
    out = reference.attention(q, k, v, number, number)
    return jnp.where(within.any(1)[:, :, None, None], out * (scale * q.shape[-1] ** 0.5), 1e9).astype(q.dtype)


@off_gpu
def test_cudnn_is_the_reference_for_rows_of_few_documents(monkeypatch):
    monkeypatch.setattr(cudnn_calls, "dot_product_attention", packed_stand_in)
    assert_as_exact_as_the_reference(cudnn.attention, attention_inputs(150, 150))


@off_gpu
def test_cudnn_never_answers_for_a_row_of_too_many_documents(monkeypatch):
    monkeypatch.setattr(cudnn_calls, "dot_product_attention", packed_stand_in)
    q, k, v, *_ = attention_inputs(130, 130)
    segments = jnp.stack([jnp.arange(130), jnp.arange(130) // 3])
    out = cudnn.attention(q, k, v, segments, segments)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def assert_a_loop_over_groups(sizes, R: int, D: int, F: int, dtype="float32", tolerance=1e-5):
    """Value and gradients; whatever stands behind the last group, zeros come out there."""
    rng = np.random.default_rng(0)
    x, g, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((R, D), (R, F), (len(sizes), D, F)))
    x, g = (jnp.where(jnp.arange(R)[:, None] < sum(sizes), a, jnp.nan) for a in (x, g))
    out, vjp = jax.vjp(lambda x, w: triton.grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
    all_got = out, *vjp(g)
    x, g, w = (np.asarray(a, np.float64) for a in (x, g, w))
    want_out, want_dx, want_dw = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape)
    for e, (n, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        rows = slice(end - n, end)
        want_out[rows], want_dx[rows], want_dw[e] = x[rows] @ w[e], g[rows] @ w[e].T, x[rows].T @ g[rows]
    for got, want in zip(all_got, (want_out, want_dx, want_dw), strict=True):
        atol = tolerance * np.abs(want).max(initial=0)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=atol)


@off_gpu
@pytest.mark.parametrize("sizes", [(140, 0, 6), (0, 0)])
def test_grouped_matmul_is_a_loop_over_groups(sizes, monkeypatch):
    monkeypatch.setattr(triton.pl, "pallas_call", partial(triton.pl.pallas_call, interpret=True))
    assert_a_loop_over_groups(sizes, R=170, D=40, F=136)


@off_gpu
@pytest.mark.parametrize(
    ("backend", "change", "line"),
    [
        (mosaic_gpu, dict(dtype=jnp.float32), "takes bfloat16 or float16, not float32.*'blockwise'"),
        (mosaic_gpu, dict(H=192), "head dimensions up to 128, not 192"),
        (cudnn, dict(dtype=jnp.float32), "takes bfloat16 or float16, not float32"),
        (cudnn, dict(H=36), "head dimensions up to 256 in eights, not 36"),
        (cudnn, dict(S=32), "whole rows: use 'mosaic_gpu'"),
    ],
)
def test_what_a_backend_cannot_do_it_says(backend, change, line):
    q, k, v, q_segments, kv_segments, positions, _ = attention_inputs(**{"T": 16, "S": 16, **change})
    positions = None if positions is None else jnp.asarray(positions)
    with pytest.raises(ValueError, match=line):
        backend.attention(q, k, v, q_segments, kv_segments, positions)


# Compiled for an H100, wherever the compiler is.


def temporaries_on_h100(f, *shapes: tuple[tuple[int, ...], str]) -> int:
    """Bytes of f forward and backward, differentiated by its arguments of floating point, compiled for one H100."""
    from training.h100 import cross_compiling, topology

    mesh = jax.sharding.Mesh(np.array(topology(hosts=1, gpus=1)), ("one",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here) for shape, dtype in shapes]
    by = tuple(i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    with cross_compiling(), jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda *a: f(*a).astype(jnp.float32).sum(), by))
        memory = gradient.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


needs_plugin = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="compiling for H100s needs jax's CUDA 13 plugin"
)


@off_gpu
@needs_plugin
@needs_tokamax
@pytest.mark.parametrize("part", [False, True])
def test_mosaic_compiles_in_linear_memory(part):
    def temporaries(S: int) -> int:
        T = S // 4 if part else S
        q, k, segments = ((1, T, 5, 128), "bfloat16"), ((1, S, 1, 128), "bfloat16"), [((1, n), "int32") for n in (T, S)]
        positions = [((T,), "int32")] if part else []
        return temporaries_on_h100(mosaic_gpu.attention, q, k, k, *segments, *positions)

    assert temporaries(16384) < 2.1 * temporaries(8192)


@off_gpu
@needs_plugin
def test_grouped_matmul_compiles_without_a_copy_of_the_weights():
    R, D, F, E = 1024, 512, 1024, 16
    shapes = ((R, D), "bfloat16"), ((E, D, F), "bfloat16"), ((E,), "int32")
    assert temporaries_on_h100(triton.grouped_matmul, *shapes) < E * D * F


# Numbers on a GPU.


@on_gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), (8192, 8192), (1024, 8192)], ids=str)
@pytest.mark.parametrize("backend", [mosaic_gpu, cudnn], ids=["mosaic_gpu", "cudnn"])
def test_attention_on_a_gpu(backend, shape):
    if backend is cudnn and shape[0] != shape[1]:
        pytest.skip("cudnn takes whole rows")
    if backend is mosaic_gpu and not importlib.util.find_spec("tokamax"):
        pytest.skip("needs tokamax")
    assert_as_exact_as_the_reference(backend.attention, attention_inputs(*shape, H=128))


@on_gpu
@needs_tokamax
@pytest.mark.parametrize("H", [32, 64])
def test_heads_of_tiny_models_on_a_gpu(H):
    assert_as_exact_as_the_reference(mosaic_gpu.attention, attention_inputs(256, 256, H=H))


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_grouped_matmul_on_a_gpu(dtype, tolerance):
    assert_a_loop_over_groups((0, 700, 0, 1, 300, 0), 1100, 520, 392, dtype, tolerance)
