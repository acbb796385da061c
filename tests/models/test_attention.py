"""Attention over whole sequences in blocks of queries: what it gives, and what memory it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention, cache, transformer
from opd_jax.parallel import sharding
from opd_jax.preflight import jaxprs
from tests import tiny

B, C = 4, 8
LONG = 2048
MODEL = tiny.STUDENT.replace(max_positions=2 * LONG)


@pytest.fixture
def blocks_of_16(monkeypatch):
    monkeypatch.setattr(attention, "ONE_PRODUCT", 16)
    monkeypatch.setattr(attention, "QUERIES", 16)


def padded(length):
    """Rows without padding, padded on the left past a block, on the right, and on both sides."""
    mask_BL = np.ones((B, length), bool)
    mask_BL[1, : length // 2 + 1] = False
    mask_BL[2, length // 2 :] = False
    mask_BL[3, [0, -1]] = False
    return mask_BL


def arrays(heads, kv_heads, length):
    draw = np.random.default_rng(length).normal
    shapes = [(B, length, n, C) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def whole(q, k, v, mask_BL):
    return attention.attend(q, *attention.cached(k, v), attention.causal_mask(mask_BL))


def in_blocks(q, k, v, mask_BL):
    return attention.causal(mask_BL)(q, *attention.cached(k, v))


def gradients_and_value(attend):
    """Of the output at real tokens, in a fixed direction; and the whole output."""

    def loss(q, k, v, direction, mask_BL):
        out = attend(q, k, v, mask_BL)
        real = jnp.where(mask_BL[:, :, None, None], out, 0)
        return (real * direction).sum(), (real, jnp.isfinite(out).all())

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert got[1][1], "padding is finite"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("length", [17, 37, 67, 128])  # of 2, 3, 5 and 8 blocks
@pytest.mark.usefixtures("blocks_of_16")
def test_blocks_of_queries_give_the_values_and_gradients_of_one_product(length, heads, kv_heads):
    inputs = (*arrays(heads, kv_heads, length), padded(length))
    got, want = (jax.jit(gradients_and_value(attend))(*inputs) for attend in (in_blocks, whole))
    check(got, want)


@pytest.mark.usefixtures("blocks_of_16")
def test_blocks_on_a_mesh_give_what_one_device_gives():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    inputs = (*arrays(4, 2, 67), padded(67))
    program = jax.jit(sharding.on(mesh, gradients_and_value(in_blocks)))
    check(program(*jax.device_put(inputs, sharding.batch(mesh))), gradients_and_value(whole)(*inputs))


def test_a_sequence_of_one_block_is_one_product_as_before():
    inputs = (*arrays(4, 2, 40)[:3], padded(40))
    np.testing.assert_array_equal(jax.jit(in_blocks)(*inputs), jax.jit(whole)(*inputs))


@pytest.mark.parametrize("length", [16, 17, 37, 67, 128])
@pytest.mark.usefixtures("blocks_of_16")
def test_the_scores_of_a_length_are_those_that_its_products_compute(length):
    inputs = (*arrays(3, 1, length)[:3], padded(length))
    flops = jaxprs.matmul_flops(jax.make_jaxpr(in_blocks)(*inputs).jaxpr)
    assert flops == 4 * B * 3 * C * attention.score_count(length)


def hidden_sum(params, tokens_BL, mask_BL):
    return transformer.forward(MODEL, params, tokens_BL, mask_BL, remat="full").sum()


def prefill(params, tokens_BP, mask_BP):
    return cache.prefill(MODEL, params, tokens_BP, mask_BP)


@pytest.mark.parametrize(
    "program", [hidden_sum, jax.grad(hidden_sum), prefill], ids=["forward", "gradient", "prefill"]
)
def test_memory_grows_with_the_length_and_no_array_with_its_square(program):
    temporaries = []
    for length in (LONG, 2 * LONG):
        row = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
        compiled = jax.jit(program).lower(transformer.abstract(MODEL), *row).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        shapes = re.findall(r"\[([\d,]+)\]", compiled.as_text())
        sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
        assert max(sizes) <= MODEL.heads * attention.QUERIES * length
    assert temporaries[1] < 2.6 * temporaries[0]


@pytest.mark.parametrize("int8", [False, True])
def test_a_prefill_in_blocks_gives_the_states_and_the_cache_of_one_product(request, int8):
    params, tokens_BP = tiny.weights(MODEL), np.arange(B * 67).reshape(B, 67) % 250
    mask_BP = np.arange(67) >= np.array([[0], [40], [66], [7]])

    def run():
        return jax.jit(lambda *batch: cache.prefill(MODEL, params, *batch, int8=int8))(tokens_BP, mask_BP)

    hidden_BD, want = run()
    request.getfixturevalue("blocks_of_16")
    got_BD, got = run()
    np.testing.assert_allclose(got_BD, hidden_BD, atol=1e-5)
    for layer, want_layer in zip(got.layers, want.layers, strict=True):
        for one, other, axis in zip(layer, want_layer, attention.SLOT_AXES):
            assert (one.shape, one.dtype) == (other.shape, other.dtype) and np.isfinite(one).all()
            real = mask_BP.reshape([B] + [67 if i == axis else 1 for i in range(1, 4)])
            pair = (np.where(real, x, 0).astype(np.float32) for x in (one, other))
            np.testing.assert_allclose(*pair, atol=1 if one.dtype == jnp.int8 else 1e-5)
