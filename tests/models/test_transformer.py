"""The transformer's parameter declaration, padding, pruning and vocabulary mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.parallel import sharding

BASE = ModelConfig(
    family="llama",
    vocab_size=64,
    valid_vocab=64,
    width=24,
    layers=3,
    heads=6,
    kv_heads=2,
    head_size=8,
    ffn=40,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    qk_norm=False,
    attention_bias=False,
    max_positions=128,
    eos_ids=(2,),
)
CONFIGS = {
    "llama": BASE,
    "qwen2": BASE.replace(family="qwen2", attention_bias=True, kv_heads=1),
    "qwen3": BASE.replace(family="qwen3", qk_norm=True, tie_embeddings=False, layers=1),
    "qwen3_moe": BASE.replace(family="qwen3_moe", qk_norm=True, experts=4, experts_per_token=2, layers=2),
}
EVERY_FAMILY = pytest.mark.parametrize("family", CONFIGS)

forward = jax.jit(transformer.forward, static_argnums=0, static_argnames="remat")


@functools.cache
def params_of(config):
    """Random weights by NumPy: compiling JAX's generator would take most of this file's time."""
    draw = np.random.default_rng(0).normal

    def weight(path, like):
        shift, scale = (1, 0.3) if "norm" in path[-1].key else (0, like.shape[-1] ** -0.5)
        return jnp.asarray(shift + scale * draw(size=like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(weight, transformer.abstract(config))


def random_tokens(shape):
    return jax.random.randint(jax.random.key(1), shape, 3, BASE.vocab_size)


@EVERY_FAMILY
def test_each_parameter_has_one_logical_axis_a_dimension_of_that_size(family):
    config = CONFIGS[family]
    sizes = {"layers": config.layers, "embed": config.width, "vocab": config.vocab_size}
    sizes |= {"heads": config.heads, "kv_heads": config.kv_heads}
    sizes |= {"head_size": config.head_size, "ffn": config.ffn}
    sizes |= {"experts": config.experts, "router": config.experts}
    shapes = jax.tree.map(lambda leaf: leaf.shape, transformer.abstract(config))
    named = jax.tree.map(
        lambda names: tuple(sizes[name] for name in names),
        transformer.logical_axes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert named == shapes


def test_initial_weights_have_the_declared_shapes_and_a_variance_of_one_over_fan_in():
    config = CONFIGS["qwen3"].replace(width=64, ffn=96)
    params = transformer.init(config, jax.random.key(0), jnp.bfloat16)
    declared = transformer.abstract(config, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), declared
    )
    fans = {"query": 64, "key": 64, "output": 6 * 8, "gate": 64, "down": 96}
    for name, fan_in in fans.items():
        weight = params["blocks"][name].astype(jnp.float32)
        assert abs(float(weight.std()) * fan_in**0.5 - 1) < 0.1
    assert (params["final_norm"] == 1).all()


@EVERY_FAMILY
def test_parameter_count_is_the_number_of_declared_parameters(family):
    config = CONFIGS[family]
    leaves = jax.tree.leaves(transformer.abstract(config))
    assert config.parameter_count() == sum(leaf.size for leaf in leaves)


@EVERY_FAMILY
def test_padding_on_either_side_leaves_real_positions_as_they_were(family):
    config = CONFIGS[family]
    tokens = random_tokens((2, 7))
    plain = forward(config, params_of(config), tokens, jnp.ones((2, 7), bool))
    pads = [((0, 0), pad) for pad in ((5, 0), (0, 5), (3, 2))]
    # The padding holds a real id, so that a mask which is not obeyed shows.
    padded = jnp.concatenate([jnp.pad(tokens, pad, constant_values=9) for pad in pads])
    mask = jnp.concatenate([jnp.pad(jnp.ones((2, 7), bool), pad) for pad in pads])
    hidden = np.asarray(forward(config, params_of(config), padded, mask))[np.asarray(mask)]
    want = np.tile(np.asarray(plain), (3, 1, 1)).reshape(-1, config.width)
    np.testing.assert_allclose(hidden, want, atol=2e-5)


def test_a_row_of_padding_gives_finite_values_and_finite_gradients():
    params = params_of(BASE)
    mask = jnp.array([[True] * 4, [False] * 4])

    def loss(params):
        hidden = transformer.forward(BASE, params, jnp.zeros((2, 4), jnp.int32), mask)
        return (hidden * mask[..., None]).sum(), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert jnp.isfinite(hidden).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_token_sees_no_later_token():
    tokens = random_tokens((1, 8))
    mask = jnp.ones((1, 8), bool)
    changed = tokens.at[0, 5].add(1) % BASE.vocab_size
    before = forward(BASE, params_of(BASE), tokens, mask)
    after = forward(BASE, params_of(BASE), changed, mask)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert (jnp.abs(before - after)[0, 5:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("at_a_time", [1, 3, 7, 100])
def test_the_gradient_of_looked_up_rows_is_the_same_however_many_are_summed_at_a_time(at_a_time, monkeypatch):
    monkeypatch.setattr(transformer, "LOOKED_UP", at_a_time)
    ids_BL = np.random.default_rng(0).integers(0, 6, (2, 7))
    grad_BLD = np.random.default_rng(1).normal(size=(2, 7, 4)).astype(np.float32)
    want_VD = np.zeros((6, 4), np.float32)
    np.add.at(want_VD, ids_BL, grad_BLD)
    rows_BLD, pullback = jax.vjp(lambda table: transformer.look_up(table, ids_BL), jnp.eye(6, 4))
    np.testing.assert_array_equal(rows_BLD, np.eye(6, 4)[ids_BL])
    np.testing.assert_allclose(pullback(jnp.asarray(grad_BLD))[0], want_VD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("at_a_time", [3, 100])
def test_the_gradient_of_a_list_of_ids_into_a_bfloat16_table_is_the_same_on_a_mesh(at_a_time, monkeypatch):
    monkeypatch.setattr(transformer, "LOOKED_UP", at_a_time)
    ids_N = np.array([3, 0, 3, 5, 3, 0, 7])
    grad_ND = np.random.default_rng(1).integers(-8, 9, (7, 4)).astype(jnp.bfloat16)  # whole: sums are exact
    table_VD = jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4)
    want_VD = np.zeros((8, 4), np.float32)
    np.add.at(want_VD, ids_N, grad_ND.astype(np.float32))

    def rows_and_gradient(table_VD, ids_N, grad_ND):
        rows_ND, pullback = jax.vjp(lambda table: transformer.look_up(table, ids_N), table_VD)
        return rows_ND, pullback(grad_ND)[0]

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for fn in (rows_and_gradient, sharding.on(mesh, rows_and_gradient)):
        rows_ND, got_VD = jax.jit(fn)(table_VD, ids_N, grad_ND)
        assert rows_ND.dtype == got_VD.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rows_ND, np.asarray(table_VD)[ids_N])
        np.testing.assert_array_equal(np.asarray(got_VD, np.float32), want_VD)


def test_rematerialisation_changes_neither_values_nor_gradients():
    tokens, mask = random_tokens((2, 6)), jnp.ones((2, 6), bool)

    def loss(params, remat):
        return jnp.square(transformer.forward(BASE, params, tokens, mask, remat=remat)).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want = value_and_grad(params_of(BASE), "none")
    for remat in ("full", "dots"):
        got = value_and_grad(params_of(BASE), remat)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_pruned_model_is_the_model_whose_removed_blocks_add_nothing():
    params = params_of(BASE)
    blocks = dict(params["blocks"])
    for name in ("output", "down"):
        blocks[name] = blocks[name].at[1].set(0)
    tokens, mask = random_tokens((2, 6)), jnp.ones((2, 6), bool)
    want = forward(BASE, params | {"blocks": blocks}, tokens, mask)
    config, pruned = transformer.prune(BASE, params, [1])
    assert config == BASE.replace(layers=2)
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(
        lambda leaf: leaf.shape, transformer.abstract(config)
    )
    np.testing.assert_allclose(forward(config, pruned, tokens, mask), want, atol=1e-5)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 1, 2]])
def test_pruning_a_block_that_is_not_there_or_all_of_them_is_refused(layers):
    with pytest.raises(ValueError, match="cannot remove layers"):
        transformer.prune(BASE, params_of(BASE), layers)


def test_ids_past_the_tokenizer_have_no_probability():
    config = BASE.replace(valid_vocab=50)
    params = params_of(BASE)
    hidden = forward(config, params, random_tokens((1, 3)), jnp.ones((1, 3), bool))
    logits = transformer.logits(config, transformer.head(config, params), hidden)
    whole = transformer.logits(BASE, transformer.head(BASE, params), hidden)
    np.testing.assert_array_equal(logits[..., :50], whole[..., :50])
    assert (jax.nn.softmax(logits)[..., 50:] == 0).all()


def test_exchanged_ids_exchange_their_logits_and_nothing_else():
    params = params_of(BASE)
    tokens, mask = random_tokens((1, 3)), jnp.ones((1, 3), bool)
    config = BASE.replace(swapped_ids=(3, 60))
    hidden = forward(config, params, tokens, mask)
    np.testing.assert_array_equal(hidden, forward(BASE, params, tokens, mask))
    want = np.array(transformer.logits(BASE, transformer.head(BASE, params), hidden))
    want[..., [3, 60]] = want[..., [60, 3]]
    np.testing.assert_array_equal(transformer.logits(config, transformer.head(config, params), hidden), want)


def test_bfloat16_compute_stays_near_float32_and_logits_are_float32():
    tokens, mask = random_tokens((2, 8)), jnp.ones((2, 8), bool)
    config = BASE.replace(compute_dtype="bfloat16")
    params = params_of(BASE)
    want = transformer.logits(BASE, transformer.head(BASE, params), forward(BASE, params, tokens, mask))
    got = transformer.logits(config, transformer.head(config, params), forward(config, params, tokens, mask))
    assert got.dtype == jnp.float32
    assert 1e-4 < jnp.abs(got - want).max() < 0.1
