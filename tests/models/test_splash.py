"""The splash kernel, interpreted, against plain attention: values, gradients, and where it is chosen."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import UserError
from opd_jax.models import attention, cache, splash, transformer
from opd_jax.parallel import sharding
from opd_jax.preflight import jaxprs
from opd_jax.run import resolve
from tests import tiny

B, L, C = 4, 384, 128  # three blocks of 128
MASK_BL = np.ones((B, L), bool)
MASK_BL[0, :150] = False  # padded on the left, past a block
MASK_BL[1, 200:] = False
MASK_BL[2, [0, -1]] = False


def arrays(heads, kv_heads, length=L, c=C):
    draw = np.random.default_rng(heads).normal
    shapes = [(B, length, n, c) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def plain(q, k, v, mask_BL):
    return attention.attend(q, *attention.cached(k, v), attention.causal_mask(mask_BL))


interpreted = functools.partial(splash.attend, interpret=True)


def gradients_and_value(attend):
    """Of the output at real tokens, in a fixed direction."""

    def loss(q, k, v, direction, mask_BL):
        out = jnp.where(mask_BL[:, :, None, None], attend(q, k, v, mask_BL), 0)
        return (out * direction).sum(), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [(None, 2), ((2, 1, 2), 2), ((2, 2, 2), 1)],
    ids=["one device", "a mesh", "a mesh that does not cut the kv heads"],
)
def test_values_and_gradients_are_those_of_plain_attention(sizes, kv_heads):
    inputs, program = arrays(4, kv_heads), gradients_and_value(interpreted)
    placed = inputs
    if sizes is not None:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: np.prod(sizes)])
        program = sharding.on(mesh, program)
        placed = jax.device_put(inputs, sharding.batch(mesh))
    got = jax.jit(program)(*placed, MASK_BL)
    want = jax.jit(gradients_and_value(plain))(*inputs, MASK_BL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize(("length", "c"), [(300, 128), (384, 64), (90, 80)])
def test_lengths_and_head_sizes_that_the_kernel_does_not_take_give_what_plain_attention_gives(length, c):
    inputs, mask_BL = arrays(4, 2, length, c), MASK_BL[:, :length].copy()
    mask_BL[0, -1] = True  # a row of padding alone has no attention
    got = jax.jit(gradients_and_value(interpreted))(*inputs, mask_BL)
    want = jax.jit(gradients_and_value(plain))(*inputs, mask_BL)
    assert got[1].shape == (B, length, 4, c)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_a_model_gives_the_same_hidden_states_with_either(monkeypatch):
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    model = tiny.STUDENT.replace(head_size=C, layers=1, max_positions=L)
    params, token_BL = tiny.weights(model), np.arange(2 * L).reshape(2, L) % 250
    forward = jax.jit(transformer.forward, static_argnums=0)
    want = forward(model, params, token_BL, MASK_BL[:2])
    got = forward(model.replace(attention="splash"), params, token_BL, MASK_BL[:2])
    np.testing.assert_allclose(got[MASK_BL[:2]], np.asarray(want)[MASK_BL[:2]], atol=2e-5)


@pytest.mark.parametrize("length", [100, L])
def test_a_prefill_gives_the_same_states_and_cache_with_either(monkeypatch, length):
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    model = tiny.STUDENT.replace(layers=2, max_positions=L)
    params, tokens_BP = tiny.weights(model), np.arange(B * length).reshape(B, length) % 250
    mask_BP = np.arange(length) >= np.array([[0], [length // 2], [length - 1], [7]])
    prefill = jax.jit(cache.prefill, static_argnums=0)
    hidden_BD, want = prefill(model, params, tokens_BP, mask_BP)
    got_BD, got = prefill(model.replace(attention="splash"), params, tokens_BP, mask_BP)
    np.testing.assert_allclose(got_BD, hidden_BD, atol=2e-5)
    real = mask_BP[:, None, None]
    for (keys, values), (want_keys, want_values) in zip(got.layers, want.layers, strict=True):
        assert np.isfinite(keys).all() and np.isfinite(values).all()
        np.testing.assert_allclose(np.where(real, keys, 0), np.where(real, want_keys, 0), atol=2e-5)
        real_slots = mask_BP[:, None, :, None]
        np.testing.assert_allclose(
            np.where(real_slots, values, 0), np.where(real_slots, want_values, 0), atol=2e-5
        )


def test_a_prefill_for_a_tpu_calls_the_kernel_and_holds_no_scores():
    model, (b, p) = tiny.STUDENT.replace(attention="splash", max_positions=2048), (2, 2048)
    row = jax.ShapeDtypeStruct((b, p), jnp.int32), jax.ShapeDtypeStruct((b, p), bool)
    traced = jax.jit(cache.prefill, static_argnums=0).trace(model, transformer.abstract(model), *row)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and f"{p}x{p}x" not in text


def test_the_kernels_blocks_above_the_diagonal_are_not_counted():
    """Of three by three blocks it computes six; plain attention multiplies all, masked or not."""
    q, k, v, _ = arrays(4, 2)
    kernel = jaxprs.matmul_flops(jax.make_jaxpr(interpreted)(q, k, v, MASK_BL).jaxpr)
    assert 9 * kernel == 6 * jaxprs.matmul_flops(jax.make_jaxpr(plain)(q, k, v, MASK_BL).jaxpr)


def chosen(kernel, *, platform="tpu", tensor=2):
    """attention_kernel of a model with 2 kv heads of 8 channels."""
    config = tiny.default()
    config.attention.kernel = kernel
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform=platform)]), shape={"tensor": tensor}
    )
    return resolve.attention_kernel(config, mesh, "teacher.path", tiny.TEACHER)


def test_auto_takes_the_kernel_where_the_devices_and_the_mesh_allow_it():
    assert chosen("auto") == chosen("splash") == "splash"
    assert chosen("plain") == "plain"


def test_a_float32_model_on_a_tpu_asks_for_products_in_full_precision(models):
    before = jax.config.jax_default_matmul_precision
    try:
        for platform, dtype, asked in (
            ("cpu", "auto", before),
            ("tpu", "auto", before),
            ("tpu", "float32", "highest"),
        ):
            mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
            resolve.model(str(models / "student"), "student.path", mesh, dtype)
            assert jax.config.jax_default_matmul_precision == asked
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"platform": "cpu"}, "runs on TPU alone"),
        ({"tensor": 4}, "divides the 2 key heads of teacher.path"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_plain_attention_or_refused(wrong, said):
    assert chosen("auto", **wrong) == "plain"
    with pytest.raises(UserError, match=f"attention.kernel=splash .*{said}.*auto or plain"):
        chosen("splash", **wrong)
