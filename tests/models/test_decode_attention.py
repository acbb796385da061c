"""The decode kernel, interpreted, against plain attention; and compiled for TPUs, where it copies no cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention, decode_attention, int8
from opd_jax.parallel import sharding
from opd_jax.preflight import hlo, topology

B, S = 8, 384  # rows in two groups or more; three blocks of 128, or a block of 256 and a part of one


def arrays(heads, kv_heads, c, dtype="float32", rows=B, slots=S):
    """(query, keys, values) as the kernel takes them."""
    rng = np.random.default_rng(heads)
    shapes = (rows, 1, heads, c), (rows, kv_heads, c, slots), (rows, kv_heads, slots, c)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def starts(written, rows=B):
    """Where each row's real slots begin: at the first slot, at the last, and between."""
    start_B = np.random.default_rng(written).integers(0, written, rows)
    start_B[:2] = 0, written - 1
    return jnp.asarray(start_B, jnp.int32)


def plain(q, keys, values, start_B, written, scales=()):
    slot_11S = jnp.arange(keys.shape[-1])[None, None]
    allowed_B1S = (start_B[:, None, None] <= slot_11S) & (slot_11S < written)
    return attention.attend(q, keys, values, allowed_B1S, scales)


interpreted = jax.jit(functools.partial(decode_attention.attend, interpret=True))


def check(inputs, written, scales=(), atol=2e-5):
    start_B = starts(written)
    got = interpreted(*inputs, start_B, jnp.int32(written), scales)
    want = plain(*inputs, start_B, written, scales)
    assert got.dtype == inputs[0].dtype and got.shape == inputs[0].shape
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=atol)


@pytest.mark.parametrize("c", [64, 128])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (8, 2), (16, 8)])
def test_the_kernel_gives_what_plain_attention_gives_over_the_written_slots(heads, kv_heads, c):
    inputs = arrays(heads, kv_heads, c)
    for written in (1, 2, 127, 128, 129, 255, 256, 257, S - 1, S):
        check(inputs, written)


@pytest.mark.parametrize("c", [64, 128])
def test_in_bfloat16_it_differs_from_plain_attention_by_rounding_alone(c):
    inputs = arrays(6, 2, c, "bfloat16")
    for written in (1, 200, S):
        check(inputs, written, atol=0.02)


@pytest.mark.parametrize("c", [64, 128])
@pytest.mark.parametrize("dtype, atol", [("float32", 2e-5), ("bfloat16", 0.03)])
def test_int8_keys_and_values_are_scaled_as_in_plain_attention(dtype, atol, c):
    q, keys, values = arrays(6, 2, c, dtype)
    k, v = int8.quantise(keys, (2,)), int8.quantise(values, (3,))
    inputs, scales = (q, k.values, v.values), (k.scale, v.scale.swapaxes(2, 3))
    for written in (1, 130, S):
        check(inputs, written, scales, atol)


@pytest.mark.parametrize("c", [64, 128])
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_what_stands_in_unwritten_slots_does_not_matter(cache, c):
    q, keys, values = arrays(4, 2, c)
    written, start_B, scales, garbage = 150, starts(150), (), jnp.nan
    if cache == "int8":
        k, v = int8.quantise(keys, (2,)), int8.quantise(values, (3,))
        keys, values, garbage = k.values, v.values, -128
        scales = [x.at[..., written:].set(jnp.nan) for x in (k.scale, v.scale.swapaxes(2, 3))]
    dirty = keys.at[..., written:].set(garbage), values.at[:, :, written:].set(garbage)
    got = interpreted(q, *dirty, start_B, jnp.int32(written), scales)
    cut = [x[..., :written] for x in (keys, *scales)]
    want = plain(q, cut[0], values[:, :, :written], start_B, written, cut[1:])
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_row_without_a_real_slot_gives_a_finite_value_and_leaves_the_others_as_they_were():
    inputs, start_B = arrays(4, 2, 128), starts(200)
    want = interpreted(*inputs, start_B, jnp.int32(200))
    got = interpreted(*inputs, start_B.at[3].set(200).at[6].set(S), jnp.int32(200))
    assert np.isfinite(got).all()
    others = np.array([0, 1, 2, 4, 5, 7])
    np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_a_mesh_gives_what_one_device_gives_whether_it_cuts_the_heads_or_not(cache, kv_heads):
    q, keys, values = arrays(2 * kv_heads, kv_heads, 64)
    scales = ()
    if cache == "int8":
        k, v = int8.quantise(keys, (2,)), int8.quantise(values, (3,))
        keys, values, scales = k.values, v.values, (k.scale, v.scale.swapaxes(2, 3))
    operands = q, keys, values, starts(300), jnp.int32(300), scales
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    attend = functools.partial(decode_attention.attend, interpret=True)
    placed = *jax.device_put(operands[:4], sharding.batch(mesh)), *operands[4:]
    got = jax.jit(sharding.on(mesh, attend))(*placed)
    np.testing.assert_allclose(got, plain(*operands), atol=2e-5)


def test_a_cache_whose_slots_are_no_multiple_of_128_is_refused():
    with pytest.raises(ValueError, match="300 slots.*multiple of 128"):
        decode_attention.attend(*arrays(2, 2, 64, slots=300), starts(1), 1)


@pytest.mark.parametrize(
    "rows, kv_heads, c", [(64, 8, 128), (256, 5, 64), (1, 8, 128), (7, 1, 64), (2, 32, 256)]
)
def test_a_steps_blocks_fill_their_budget_and_cut_the_rows_evenly(rows, kv_heads, c):
    r, s = decode_attention.block(rows, kv_heads, c, 2048, 2)
    size = r * s * 2 * kv_heads * c * 2
    assert rows % r == 0 and s % 128 == 0
    assert size <= decode_attention.STEP_BYTES or (r, s) == (1, 128)
    assert size >= decode_attention.STEP_BYTES // 4 or s == decode_attention.MAX_SLOTS


def loop(attend, heads, kv_heads, c, dtype, rows=16, slots=1024, layers=2):
    """A decode loop's use of the cache, to be lowered: (function, shapes)."""

    def step(state):
        t, out, caches = state
        kept = []
        for keys, values, *scales in caches:
            new = out.reshape(rows, kv_heads, -1, c).sum(axis=2)[:, :, :, None]
            new = [new.astype(keys.dtype), new.swapaxes(2, 3).astype(keys.dtype)]
            new += [jnp.abs(out).max(axis=(1, 2, 3), keepdims=True).astype(jnp.float32) for _ in scales]
            shapes = (rows, kv_heads, c, 1), (rows, kv_heads, 1, c), *((rows, kv_heads, 1, 1) for _ in scales)
            layer = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, jnp.broadcast_to(x, shape), t, axis)
                for old, x, shape, axis in zip((keys, values, *scales), new, shapes, (3, 2, 3, 3))
            )
            out = attend(out, layer[0], layer[1], start_B_of(out), t + 1, layer[2:])
            kept.append(layer)
        return t + 1, out, tuple(kept)

    def start_B_of(out):
        return (out[:, 0, 0, 0] > 0).astype(jnp.int32)

    def program(t, q, caches):
        return jax.lax.while_loop(lambda s: s[0] < slots, step, (t, q, caches))[1]

    cache_dtype = jnp.int8 if dtype == "int8" else jnp.bfloat16
    layer = [((rows, kv_heads, c, slots), cache_dtype), ((rows, kv_heads, slots, c), cache_dtype)]
    layer += [((rows, kv_heads, 1, slots), jnp.float32)] * (2 if dtype == "int8" else 0)
    caches = tuple(tuple(jax.ShapeDtypeStruct(*x) for x in layer) for _ in range(layers))
    return program, (
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((rows, 1, heads, c), jnp.bfloat16),
        caches,
    )
