"""The parts that every layer shares, against their formulas."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.attention import attention_temperature
from llama4_jax.axes import Execution
from llama4_jax.config import Rope, maverick, scout, tiny_scout
from llama4_jax.layers import Embedding, RMSNorm, SwiGLU, rms_normalise, rope_frequencies, rotate


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rotation_turns_interleaved_pairs_as_complex_numbers():
    """(x_2i + i x_2i+1) exp(i p w_i), the frequencies in float64 from their definition."""
    x_BTNH = normal(0, 2, 7, 3, 16)
    positions_BT = jnp.array([[0, 1, 2, 3, 4, 5, 6], [5, 90, 91, 300, 0, 1, 2]])
    w = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    x = np.asarray(x_BTNH, np.float64)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.asarray(positions_BT)[:, :, None, None] * w)
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    got = rotate(x_BTNH, positions_BT, rope_frequencies(Rope(theta=10_000.0), 16))
    np.testing.assert_allclose(got, want, atol=1e-4)  # an fp32 angle of 300 is exact to 3e-5
    np.testing.assert_array_equal(got[0, 0], x_BTNH[0, 0])  # position 0 turns nothing


def test_rotated_products_depend_on_the_distance_alone():
    q, k = normal(1, 1, 1, 1, 32), normal(2, 1, 1, 1, 32)
    frequencies = rope_frequencies(tiny_scout().rope, 32)

    def product(p: int, s: int) -> float:
        return float(jnp.sum(rotate(q, jnp.array([[p]]), frequencies) * rotate(k, jnp.array([[s]]), frequencies)))

    assert product(12, 5) == pytest.approx(product(107, 100), abs=1e-4)
    assert product(12, 5) != pytest.approx(product(12, 6), abs=1e-2)


def test_rotation_keeps_the_dtype_and_works_in_fp32():
    x = normal(3, 1, 4, 2, 8)
    positions, frequencies = jnp.array([[1000, 1001, 1002, 1003]]), rope_frequencies(Rope(theta=100.0), 8)
    low = x.astype(jnp.bfloat16)
    got = rotate(low, positions, frequencies)
    assert got.dtype == jnp.bfloat16
    want = rotate(low.astype(jnp.float32), positions, frequencies).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_scouts_frequencies_are_cut_at_the_35th():
    """16/1/1 at head dim 128, theta 500,000: i = 0..34 unchanged, 35..63 divided by 16; Maverick's all unchanged."""
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    divisor = np.where(np.arange(64) < 35, 1.0, 16.0)
    np.testing.assert_allclose(rope_frequencies(scout().rope, 128), plain / divisor, rtol=1e-5)
    np.testing.assert_allclose(rope_frequencies(maverick().rope, 128), plain, rtol=1e-5)


def test_frequencies_between_the_bands_are_interpolated():
    """8/1/4, the scaling of Llama 3.1, written out one frequency at a time."""
    rope = Rope(factor=8.0, low=1.0, high=4.0)
    want = []
    for w in 500_000.0 ** (-np.arange(0, 128, 2) / 128):
        wavelength = 2 * np.pi / w
        if wavelength < rope.original / rope.high:
            want.append(w)
        elif wavelength > rope.original / rope.low:
            want.append(w / rope.factor)
        else:
            s = (rope.original / wavelength - rope.low) / (rope.high - rope.low)
            want.append((1 - s) * w / rope.factor + s * w)
    got = rope_frequencies(rope, 128)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    plain = rope_frequencies(Rope(), 128)
    assert np.any((got < 0.99 * plain) & (got > 1.01 * plain / rope.factor))  # the middle band is not empty


def test_temperature_steps_at_multiples_of_the_floor_scale():
    """Exactly 1 up to position 8190, then 1 + 0.1 ln 2; still on its step at ten million."""
    positions = jnp.array([[0, 1, 8190, 8191, 16_382, 16_383, 10_485_758, 10_485_759]])
    steps = np.array([0, 0, 0, 1, 1, 2, 1279, 1280])
    got = np.asarray(attention_temperature(scout(), positions))[0]
    np.testing.assert_array_equal(got[:3], 1.0)
    assert got[3] == pytest.approx(1.0693, abs=5e-5)
    np.testing.assert_allclose(got, 1 + 0.1 * np.log1p(steps), rtol=1e-6)
    assert got[5] > got[4] and got[7] > got[6]


def test_rms_norm_is_its_formula():
    x = normal(4, 2, 3, 8) * 5
    x64 = np.asarray(x, np.float64)
    want = x64 / np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_normalise(x, 1e-5), want, rtol=1e-6)

    norm = RMSNorm(replace(tiny_scout(), embed_dim=8), nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale_D[...], 1.0)
    norm.scale_D[...] = jnp.arange(8.0)
    np.testing.assert_allclose(norm(x), want * np.arange(8.0), rtol=1e-6)


def test_rms_norm_sums_in_fp32_and_casts_before_it_scales():
    """In bf16 the mean of squares would lose small entries beside large ones; the scale multiplies what was cast."""
    x = (normal(5, 1, 2, 4096) * 3 + 10).astype(jnp.bfloat16)
    normed = rms_normalise(x, 1e-5)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-5)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=2.0**-8)  # half a unit in the last place


def test_swiglu_is_its_formula():
    cfg = replace(tiny_scout(), embed_dim=8, init_std=0.5)
    ffn = SwiGLU(cfg, 12, nnx.Rngs(0))
    x = normal(6, 5, 8)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (ffn.wi_gate_DF, ffn.wi_up_DF, ffn.wo_FD))
    x64 = np.asarray(x, np.float64)
    z = x64 @ gate
    np.testing.assert_allclose(ffn(x, Execution()), (z / (1 + np.exp(-z)) * (x64 @ up)) @ down, rtol=1e-4, atol=1e-6)


def test_embedding_looks_rows_up():
    cfg = replace(tiny_scout(), vocab_size=10, embed_dim=8)
    embedding = Embedding(cfg, nnx.Rngs(0))
    tokens_BT = jnp.array([[3, 9, 0], [3, 3, 1]])
    np.testing.assert_array_equal(embedding(tokens_BT), np.asarray(embedding.table_VD[...])[np.asarray(tokens_BT)])


def test_initial_weights_have_the_declared_spread():
    """Standard deviation init_std, 1/sqrt(2L) of it back into the residual stream, nothing beyond three of them."""
    cfg = replace(tiny_scout(), embed_dim=64)
    ffn = SwiGLU(cfg, 512, nnx.Rngs(0))
    truncated = 0.9866  # standard deviation of a unit normal cut at three
    for weight, std in [(ffn.wi_gate_DF, cfg.init_std), (ffn.wo_FD, cfg.init_std / np.sqrt(2 * cfg.num_layers))]:
        value = np.asarray(weight[...])
        assert value.std() == pytest.approx(std * truncated, rel=0.02)
        assert np.abs(value).max() <= 3 * std
