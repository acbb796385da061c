"""The key/value cache in int8: what it holds, what it costs in memory, and what it changes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from opd_jax.distill import rollout
from opd_jax.models import attention, cache, int8, transformer
from opd_jax.parallel import sharding
from opd_jax.run import programs
from tests import tiny

MODEL = tiny.STUDENT.replace(layers=8, head_size=64, max_positions=1024)


@pytest.mark.parametrize("axis", [1, 2])
def test_int8_values_times_their_scale_are_within_half_a_scale_and_reach_127(axis):
    x = np.random.default_rng(0).normal(size=(3, 40, 50)).astype(np.float32)
    x[1] *= 1e4
    x[2, :, 7] = x[2, 7] = 0
    kept = int8.quantise(jnp.asarray(x), (axis,))
    values, scale = kept.values, kept.scale
    assert values.dtype == jnp.int8
    assert scale.shape == x.max(axis=axis, keepdims=True).shape
    error = np.abs(np.asarray(values, np.float64) * np.asarray(scale) - x)
    assert (error <= np.asarray(scale) * 0.5001).all()
    largest = np.abs(np.asarray(values, np.int32)).max(axis=axis)
    assert set(np.unique(largest)) == {0, 127}


def test_attention_over_int8_keys_and_values_is_that_over_their_products_with_the_scales():
    rng = np.random.default_rng(1)
    b, heads, kv, c, slots = 2, 4, 2, 8, 11
    q = rng.normal(size=(b, 1, heads, c)).astype(np.float32)
    k, v = (rng.integers(-127, 128, (b, kv, c, slots)).astype(np.int8) for _ in range(2))
    v = v.swapaxes(2, 3)
    scales = [rng.uniform(0.002, 0.01, (b, kv, 1, slots)).astype(np.float32) for _ in range(2)]
    allowed = np.arange(slots)[None, None] < np.array([4, slots])[:, None, None]
    got = attention.attend(*map(jnp.asarray, (q, k, v, allowed)), scales)
    k, v = k * scales[0].astype(np.float64), v * scales[1].swapaxes(2, 3).astype(np.float64)
    for row in range(b):
        for head in range(heads):
            score = q[row, 0, head] @ k[row, head // 2] / np.sqrt(c)
            weight = special.softmax(np.where(allowed[row, 0], score, -np.inf))
            np.testing.assert_allclose(got[row, 0, head], weight @ v[row, head // 2], atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("written", [1, 64, 65, 130, 192])
def test_attention_in_blocks_reads_the_written_slots_alone_and_gives_what_one_product_gives(int8, written):
    rng = np.random.default_rng(written)
    b, heads, kv, c, slots = 5, 6, 2, 8, 3 * attention.SLOTS
    q = jnp.asarray(rng.normal(size=(b, 1, heads, c)), jnp.float32)
    start_B = jnp.asarray(rng.integers(0, written, b), jnp.int32)
    shapes = [(b, kv, c, slots), (b, kv, slots, c)] + [(b, kv, 1, slots)] * 2 * int8
    layer = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    if int8:
        layer[:2] = [rng.integers(-127, 128, x.shape).astype(np.int8) for x in layer[:2]]
        layer[2:] = [np.abs(x) / 100 for x in layer[2:]]
    attend = jax.jit(attention.attend_written, static_argnums=4)
    whole = np.asarray(
        attend(q, tuple(layer), start_B, jnp.int32(written), False)
    )  # before the arrays change
    read = -(-written // attention.SLOTS) * attention.SLOTS
    for x, axis in zip(layer, attention.SLOT_AXES):  # what is read would be seen
        x[(slice(None),) * axis + (slice(read, None),)] = 127 if x.dtype == np.int8 else np.nan
    np.testing.assert_allclose(
        attend(q, tuple(layer), start_B, jnp.int32(written), True), whole, atol=2e-5 if int8 else 2e-6
    )


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_tokens_behind_a_cache_give_the_states_of_one_forward_pass(kind, int8, monkeypatch):
    """Two blocks behind left-padded prompts, read in pieces that end within a block."""
    monkeypatch.setattr(cache, "READ", (8, 8))
    experts = {"experts": 4, "experts_per_token": 2} if kind == "sparse" else {}
    model = tiny.STUDENT.replace(family="qwen3_moe" if experts else "qwen3", qk_norm=True, **experts)
    params = tiny.weights(model)
    (b, p, r), rng = (3, 6, 7), np.random.default_rng(0)
    tokens_BL = rng.integers(33, 120, (b, p + 2 * r)).astype(np.int32)
    mask_BL = np.arange(p + 2 * r) >= np.array([0, 2, 5])[:, None]
    want_BLD = np.asarray(transformer.forward(model, params, tokens_BL, mask_BL))

    @jax.jit
    def behind(params, tokens_BL, mask_BL):
        _, prefilled = cache.prefill(model, params, tokens_BL[:, :p], mask_BL[:, :p], int8=int8)
        own, found = cache.stack(model, prefilled, p + 2 * r), []
        place_BL = transformer.positions(mask_BL)
        for begin in (p, p + r):
            here = slice(begin, begin + r)
            rope = attention.rope_tables(model, place_BL[:, here])
            hidden_BRD, own = cache.extend(model, params, tokens_BL[:, here], rope, own, begin)
            found.append(hidden_BRD)
        return jnp.concatenate(found, axis=1)

    got_BTD = np.asarray(behind(params, tokens_BL, mask_BL))
    np.testing.assert_allclose(got_BTD, want_BLD[:, p:], atol=0.1 if int8 else 2e-5)
    if int8:
        assert np.abs(got_BTD - want_BLD[:, p:]).max() > 1e-4, "keys and values are rounded"


def test_the_compiled_sampler_needs_less_than_two_thirds_of_the_memory_in_int8():
    """The cache itself falls to 0.27 of float32; one layer's float copy at a time is left on a CPU."""
    b, p, t = 16, 64, 448
    bytes_of = {int8: _temporaries(b, p, t, int8) for int8 in (False, True)}
    cached = 4 * 2 * b * MODEL.kv_heads * MODEL.head_size * (p + t) * MODEL.layers
    assert cached < bytes_of[False] < 1.3 * cached, "the loop writes into its cache, and copies none"
    assert bytes_of[True] < 0.65 * bytes_of[False]


def test_the_decode_loops_cache_is_cut_by_row_and_key_head_and_written_in_place():
    model, (b, p, t) = MODEL.replace(layers=4, kv_heads=4, max_positions=2048), (16, 8, 2040)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    compiled = (
        programs.sample_program(mesh, model, rollout.Sampling(max_tokens=t))
        .lower(
            programs.placed(transformer.abstract(model), programs.param_shardings(mesh, model)),
            jax.ShapeDtypeStruct((b, p), jnp.int32, sharding=rows),
            jax.ShapeDtypeStruct((b, p), bool, sharding=rows),
            programs.placed(jax.eval_shape(lambda: jax.random.key(0)), whole),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        )
        .compile()
    )
    heads, c, slots = model.kv_heads // 2, model.head_size, p + t
    keys, values = f"f32[{b // 4},{heads},{c},{slots}]", f"f32[{b // 4},{heads},{slots},{c}]"
    loops = [line.partition(" while(")[0] for line in compiled.as_text().splitlines() if " while(" in line]
    decode = max(loops, key=lambda loop: loop.count(keys))
    assert (decode.count(keys), decode.count(values)) == (model.layers, model.layers)
    cached = 4 * 2 * (b // 4) * heads * c * slots * model.layers
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * cached
    # No other array along the slots has as many numbers: nothing holds more rows or heads of the cache.
    held = re.findall(rf"f32\[([\d,]*\b{slots}\b[\d,]*)\]", compiled.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in held) == b // 4 * heads * c * slots


def _temporaries(b, p, t, int8):
    sampling = rollout.Sampling(max_tokens=t, int8_cache=int8)
    shaped = jax.ShapeDtypeStruct((b, p), jnp.int32), jax.ShapeDtypeStruct((b, p), bool)
    lowered = jax.jit(rollout.sample, static_argnums=(0, 5)).lower(
        MODEL, transformer.abstract(MODEL), *shaped, jax.random.key(0), sampling
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes
