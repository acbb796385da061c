"""The decode kernel, interpreted, against plain attention; and compiled for TPU, where it copies no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention, decode_attention, int8
from opd_jax.models.attention import SLOT_AXES
from opd_jax.parallel import sharding
from opd_jax.preflight import hlo, jaxprs, topology

B, S = 8, 384  # rows in two groups or more; three blocks of 128, or one of 256 and a part of one
LAYERS = 2
SHAPES = {"Qwen3-0.6B": (16, 8, 128), "SmolLM2-360M": (15, 5, 64)}  # heads, kv heads, head size


def arrays(heads, kv_heads, c, dtype="float32", *, quantised=False):
    """(query, a layer of the cache) as the kernel takes them."""
    rng = np.random.default_rng(heads)
    shapes = (B, 1, heads, c), (B, kv_heads, c, S), (B, kv_heads, S, c)
    q, keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    if not quantised:
        return q, (keys, values)
    k, v = int8.quantise(keys, (2,)), int8.quantise(values, (3,))
    return q, (k.values, v.values, k.scale, v.scale.swapaxes(2, 3))


def starts(written):
    """Where each row's real slots begin: at the first slot, at the last, and between."""
    start_B = np.random.default_rng(written).integers(0, written, B)
    start_B[:2] = 0, written - 1
    return jnp.asarray(start_B, jnp.int32)


def plain(q, layer, start_B, written):
    keys, values, *scales = layer
    slot_11S = jnp.arange(keys.shape[-1])[None, None]
    allowed_B1S = (start_B[:, None, None] <= slot_11S) & (slot_11S < written)
    return attention.attend(q, keys, values, allowed_B1S, scales)


interpreted = jax.jit(functools.partial(decode_attention.attend, interpret=True))
writing = jax.jit(functools.partial(decode_attention.write_and_attend, interpret=True))


def check(inputs, written, atol=2e-5):
    start_B = starts(written)
    got, want = interpreted(*inputs, start_B, jnp.int32(written)), plain(*inputs, start_B, written)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=atol)


@pytest.mark.parametrize(
    "heads, kv_heads, c", [(2, 2, 64), (6, 2, 64), (6, 2, 128), (16, 4, 128), (9, 1, 256)]
)
def test_the_kernel_gives_what_plain_attention_gives_over_the_written_slots(heads, kv_heads, c):
    inputs = arrays(heads, kv_heads, c)
    for written in (1, 2, 127, 128, 129, 255, 256, 257, S - 1, S):
        check(inputs, written)


@pytest.mark.parametrize("c", [64, 128])
def test_in_bfloat16_it_differs_from_plain_attention_by_rounding_alone(c):
    for written in (1, 200, S):
        check(arrays(6, 2, c, "bfloat16"), written, atol=0.02)


@pytest.mark.parametrize(
    "c, dtype, atol", [(64, "float32", 2e-5), (128, "float32", 2e-5), (64, "bfloat16", 0.03)]
)
def test_int8_keys_and_values_are_scaled_as_in_plain_attention(c, dtype, atol):
    for written in (1, 130, S):
        check(arrays(6, 2, c, dtype, quantised=True), written, atol)


@pytest.mark.parametrize("c, quantised", [(64, False), (128, False), (128, True)])
def test_what_stands_in_unwritten_slots_does_not_matter(c, quantised):
    written, start_B = 150, starts(150)
    q, layer = arrays(4, 2, c, quantised=quantised)

    def spoilt(x, axis):
        garbage = -128 if x.dtype == jnp.int8 else np.nan
        x = np.moveaxis(np.array(x), axis, 0)
        x[written:] = garbage
        return jnp.asarray(np.moveaxis(x, 0, axis))

    got = interpreted(q, tuple(map(spoilt, layer, SLOT_AXES)), start_B, jnp.int32(written))
    np.testing.assert_allclose(got, plain(q, layer, start_B, written), atol=2e-5)


@pytest.mark.parametrize(
    "c, quantised, dtype",
    [(64, False, "float32"), (128, False, "bfloat16"), (64, True, "float32"), (128, True, "bfloat16")],
)
def test_the_kernel_writes_the_new_slot_and_no_other(c, quantised, dtype):
    q, layer = arrays(6, 2, c, dtype, quantised=quantised)
    _, other = arrays(12, 2, c, dtype, quantised=quantised)
    new = [jax.lax.slice_in_dim(x, 7, 8, axis=axis) for x, axis in zip(other, SLOT_AXES)]
    for slot in (0, 127, 130, S - 1):
        want = [
            jax.lax.dynamic_update_slice_in_dim(x, one, slot, axis)
            for x, one, axis in zip(layer, new, SLOT_AXES)
        ]
        out, got = writing(q, new, layer, starts(slot + 1), jnp.int32(slot))
        jax.tree.map(np.testing.assert_array_equal, got, tuple(want))
        np.testing.assert_array_equal(out, interpreted(q, tuple(want), starts(slot + 1), jnp.int32(slot + 1)))


def test_a_row_without_a_real_slot_gives_a_finite_value_and_leaves_the_others_as_they_were():
    inputs, start_B = arrays(6, 2, 128), starts(200)
    want = interpreted(*inputs, start_B, jnp.int32(200))
    got = interpreted(*inputs, start_B.at[3].set(200).at[6].set(S), jnp.int32(200))
    assert np.isfinite(got).all()
    others = np.array([0, 1, 2, 4, 5, 7])
    np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("kv_heads, quantised", [(2, False), (2, True), (3, True)])
def test_a_mesh_gives_what_one_device_gives_whether_it_cuts_the_heads_or_not(kv_heads, quantised):
    operands = *arrays(2 * kv_heads, kv_heads, 64, quantised=quantised), starts(300)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    attend = functools.partial(decode_attention.attend, interpret=True)
    placed = jax.device_put(operands, sharding.batch(mesh))
    got = jax.jit(sharding.on(mesh, attend))(*placed, jnp.int32(300))
    np.testing.assert_allclose(got, plain(*operands, 300), atol=2e-5)


def test_a_cache_whose_slots_are_no_multiple_of_128_is_refused():
    q, (keys, values) = arrays(2, 2, 64)
    with pytest.raises(ValueError, match="300 slots.*multiple of 128"):
        decode_attention.attend(q, (keys[..., :300], values[:, :, :300]), starts(1), 1)


@pytest.mark.parametrize(
    "rows, kv_heads, c", [(64, 8, 128), (256, 5, 64), (1, 8, 128), (7, 1, 64), (2, 32, 256)]
)
def test_a_steps_blocks_fill_their_budget_and_cut_the_rows_evenly(rows, kv_heads, c):
    r, s = decode_attention.block(rows, kv_heads, c, 2048, 2)
    size = r * s * 2 * kv_heads * c * 2
    assert rows % r == 0 and s % 128 == 0
    assert size <= decode_attention.STEP_BYTES or (r, s) == (1, 128)
    assert size >= decode_attention.STEP_BYTES // 4 or s == decode_attention.MAX_SLOTS


def test_its_products_are_counted_as_if_every_slot_were_written():
    """Queries of a kv head are filled up to eight, and slots to whole blocks of 256."""
    (q, (keys, values)), (heads, c) = arrays(6, 2, 128), (8 * 2, 128)
    jaxpr = jax.make_jaxpr(interpreted)(q, (keys, values), starts(5), 5).jaxpr
    assert decode_attention.block(B, 2, c, S, 4) == (4, 256)
    assert jaxprs.matmul_flops(jaxpr) == 2 * 2 * B * heads * c * 512


def update_then_attend(q, new, layer, start_B, slot, attend=decode_attention.attend):
    updates = zip(layer, new, SLOT_AXES)
    layer = tuple(jax.lax.dynamic_update_slice_in_dim(x, one, slot, axis) for x, one, axis in updates)
    return attend(q, layer, start_B, slot + 1), layer


def loop(write_and_attend, shape, rows, slots, *, quantised=False):
    """A sampler's use of the cache alone, to be lowered: (program, its arguments)."""
    heads, kv, c = shape
    kept = jnp.int8 if quantised else jnp.bfloat16
    layer_shapes = [((rows, kv, c, slots), kept), ((rows, kv, slots, c), kept)]
    layer_shapes += [((rows, kv, 1, slots), jnp.float32)] * 2 * quantised

    def one(x, x_BKC, axis):
        """Numbers made of x_BKC, of the shape of one slot."""
        shape = [1 if n == axis else size for n, size in enumerate(x.shape)]
        return x_BKC[..., : shape[2] * shape[3]].reshape(shape).astype(x.dtype)  # one number for a scale

    def step(state):
        t, q_B1HC, start_B, layers = state
        written = []
        for layer in layers:
            x_BKC = q_B1HC.reshape(rows, kv, -1, c).sum(axis=2, dtype=jnp.float32)
            new = [one(x, x_BKC, axis) for x, axis in zip(layer, SLOT_AXES)]
            q_B1HC, layer = write_and_attend(q_B1HC, new, layer, start_B, t)
            written.append(layer)
        return t + 1, q_B1HC, start_B, tuple(written)

    def program(t, q_B1HC, start_B):
        layers = tuple(tuple(jnp.zeros(*x) for x in layer_shapes) for _ in range(LAYERS))
        return jax.lax.while_loop(lambda s: s[0] < slots, step, (t, q_B1HC, start_B, layers))[1]

    return program, (((), jnp.int32), ((rows, 1, heads, c), jnp.bfloat16), ((rows,), jnp.int32))


@pytest.mark.parametrize(
    "write_and_attend, chip, model, quantised",
    [
        (decode_attention.write_and_attend, "v5e:1x1", "Qwen3-0.6B", False),
        (decode_attention.write_and_attend, "v6e:1x1", "SmolLM2-360M", True),
        (update_then_attend, "v5e:1x1", "SmolLM2-360M", False),
    ],
)
def test_a_tpus_loop_writes_one_slot_and_copies_no_cache(
    tpu_compiler, write_and_attend, chip, model, quantised
):
    rows, slots, (_, kv, c) = 64, 1024, SHAPES[model]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, topology.describe(chip)[1][:1])
    program, shapes = loop(write_and_attend, SHAPES[model], rows, slots, quantised=quantised)
    placed = [jax.ShapeDtypeStruct(*x, sharding=sharding.replicated(mesh)) for x in shapes]
    compiled = jax.jit(program).lower(*placed).compile()
    bodies = hlo.Program(compiled.as_text()).computations.values()
    (body,) = [lines for lines in bodies if any("tpu_custom_call" in line.text for line in lines)]
    large = [i for i in body if any(a.elements >= rows * kv * slots * c for a in i.arrays)]
    named = {"parameter", "get-tuple-element", "tuple", "bitcast"}
    found = [i.opcode for i in large if i.opcode not in named]
    assert (
        found == ["dynamic-update-slice"] * 2 * LAYERS
        if write_and_attend is update_then_attend
        else ["custom-call"] * LAYERS
    )
