"""The mixture of experts against loops over tokens and experts, its gradient and its mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import rollout
from opd_jax.models import cache, moe, transformer
from opd_jax.parallel import sharding
from tests import tiny

MODEL = tiny.STUDENT.replace(
    family="qwen3_moe",
    qk_norm=True,
    vocab_size=66,
    valid_vocab=66,
    ffn=12,
    experts=6,
    experts_per_token=2,
    normalise_experts=True,
    eos_ids=(),
    pad_id=0,
)
NORMALISED = pytest.mark.parametrize("normalised", [True, False])


@functools.partial(jax.jit, static_argnums=0)
def feed_forward(config, p, x_BLD):
    return moe.feed_forward(config, p, x_BLD, moe.route(config, p["router"], x_BLD))


forward = jax.jit(transformer.forward, static_argnums=0)


def block_weights(seed=0):
    """The first block's weights, and hidden states for it."""
    p = jax.tree.map(lambda w: w[0], tiny.weights(MODEL, seed)["blocks"])
    return p, np.random.default_rng(seed).normal(size=(2, 5, MODEL.width)).astype(np.float32)


def experts_of(config, p, x_BLD):
    """[B, L, X], the ids that the router chooses."""
    return np.asarray(moe.route(config, p["router"], x_BLD).expert_BLX)


def one_token(config, p, x_D):
    """The formula, one token and one expert at a time, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    logit_E = x_D @ p["router"]
    probability_E = np.exp(logit_E - logit_E.max())
    probability_E /= probability_E.sum()
    chosen = sorted(range(config.experts), key=lambda e: -probability_E[e])[: config.experts_per_token]
    total = sum(probability_E[e] for e in chosen) if config.normalise_experts else 1.0
    out_D = np.zeros(config.width)
    for e in chosen:
        gate_F = x_D @ p["gate"][e]
        hidden_F = gate_F / (1 + np.exp(-gate_F)) * (x_D @ p["up"][e])
        out_D += probability_E[e] / total * (hidden_F @ p["down"][e])
    return out_D, chosen


@NORMALISED
def test_every_token_gets_the_weighted_sum_of_its_experts(normalised):
    config = MODEL.replace(normalise_experts=normalised)
    p, x_BLD = block_weights()
    out_BLD, expert_BLX = feed_forward(config, p, x_BLD), experts_of(config, p, x_BLD)
    for b, l in np.ndindex(2, 5):
        want_D, chosen = one_token(config, p, x_BLD[b, l].astype(np.float64))
        np.testing.assert_allclose(out_BLD[b, l], want_D, atol=1e-5)
        assert expert_BLX[b, l].tolist() == chosen


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    p, x_BLD = block_weights()
    x_BLD = np.abs(x_BLD)
    p["router"] = jnp.zeros_like(p["router"]).at[:, [1, 4]].set(1.0)
    out_BLD = feed_forward(MODEL, p, x_BLD)
    assert set(np.unique(experts_of(MODEL, p, x_BLD))) == {1, 4}
    for b, l in np.ndindex(2, 5):
        np.testing.assert_allclose(out_BLD[b, l], one_token(MODEL, p, x_BLD[b, l])[0], atol=1e-5)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    "asked",
    [
        [[5, 0], [3, 2], [2, 5], [4, 3], [0, 2]],
        [[5, 2], [2, 5], [5, 4]],  # none for 3
        [[7, 6], [6, 7]],  # all held elsewhere
        [[1, 0], [0, 1]],  # the same, by those before the first from 2 on
    ],
)
def test_rows_stand_where_a_stable_sort_by_expert_puts_them_and_others_past_them(asked, first):
    held, expert_MX = 4, np.array(asked) - first
    place_R, size_E = jax.jit(moe._places, static_argnums=1)(expert_MX, held)
    expert_R = expert_MX.reshape(-1)
    here_R = (expert_R >= 0) & (expert_R < held)
    order_R = np.argsort(np.where(here_R, expert_R, held), kind="stable")[: here_R.sum()]
    assert np.asarray(place_R)[order_R].tolist() == list(range(len(order_R)))
    elsewhere = np.asarray(place_R)[~here_R]
    assert len(set(elsewhere)) == len(elsewhere) and (elsewhere >= len(expert_R)).all()
    assert size_E.tolist() == [(expert_R == expert).sum() for expert in range(held)]


@NORMALISED
def test_the_gradient_is_that_of_all_experts_weighted_by_zero_or_more(normalised):
    config = MODEL.replace(normalise_experts=normalised)
    p, x_BLD = block_weights()
    probe_BLD = np.random.default_rng(3).normal(size=x_BLD.shape).astype(np.float32)
    used = {name: p[name] for name in ("router", "gate", "up", "down")}

    def dense(p, x_BLD):
        probability_BLE = jax.nn.softmax(x_BLD @ p["router"])
        least_BL1 = jnp.sort(probability_BLE)[..., -config.experts_per_token, None]
        weight_BLE = jnp.where(probability_BLE >= least_BL1, probability_BLE, 0)
        if normalised:
            weight_BLE /= weight_BLE.sum(axis=-1, keepdims=True)
        gate_BLEF = jnp.einsum("bld,edf->blef", x_BLD, p["gate"])
        up_BLEF = jnp.einsum("bld,edf->blef", x_BLD, p["up"])
        hidden_BLEF = jax.nn.silu(gate_BLEF) * up_BLEF
        out_BLD = jnp.einsum("blef,efd,ble->bld", hidden_BLEF, p["down"], weight_BLE)
        return (out_BLD * probe_BLD).sum()

    def sparse(p, x_BLD):
        return (feed_forward(config, p, x_BLD) * probe_BLD).sum()

    want = jax.jit(jax.grad(dense, argnums=(0, 1)))(used, x_BLD)
    got = jax.jit(jax.grad(sparse, argnums=(0, 1)))(used, x_BLD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def batch():
    tokens_BL = np.random.default_rng(1).integers(1, 66, (8, 7)).astype(np.int32)
    return tokens_BL, np.arange(7)[None] >= np.arange(8)[:, None] % 4


def test_a_rollouts_log_probabilities_are_those_of_the_forward_pass():
    tokens_BP, mask_BP = batch()
    params = tiny.weights(MODEL)
    sampling = rollout.Sampling(max_tokens=5)
    sample = jax.jit(rollout.sample, static_argnums=(0, 5))
    written = sample(MODEL, params, tokens_BP, mask_BP, jax.random.key(0), sampling)
    mask_BL = np.concatenate([mask_BP, written.mask_BT], axis=1)
    hidden_BLD = forward(MODEL, params, written.tokens_BL, mask_BL)
    logits_BTV = transformer.logits(MODEL, transformer.head(MODEL, params), hidden_BLD[:, 6:-1])
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    logp_BT = np.take_along_axis(np.asarray(logp_BTV), np.asarray(written.response_BT)[..., None], -1)
    np.testing.assert_allclose(written.logp_BT, logp_BT[..., 0], atol=1e-4)


def loss(params, tokens_BL, mask_BL, config=MODEL):
    hidden_BLD = transformer.forward(config, params, tokens_BL, mask_BL, remat="full")
    return jnp.where(mask_BL[..., None], hidden_BLD, 0).sum(axis=-1).var()


@functools.cache
def on_one_device(config):
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    return value_and_grad(tiny.weights(config), *batch(), config)


def on_mesh(config, sizes):
    """(the mesh, where parameters live on it, its gradient program)."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    weights = sharding.param_shardings(mesh, transformer.abstract(config), transformer.logical_axes(config))
    rows = sharding.batch(mesh)
    program = jax.value_and_grad(functools.partial(loss, config=config))
    return weights, jax.jit(sharding.on(mesh, program), in_shardings=(weights, rows, rows))


@pytest.mark.parametrize(
    ("sizes", "experts"),  # eight devices cut 8 experts, and the width of 6
    [((2, 2, 2), 8), ((1, 1, 8), 6)],
)
def test_a_mesh_gives_the_values_and_gradients_of_one_device(sizes, experts):
    config = MODEL.replace(experts=experts, ffn=16)
    weights, program = on_mesh(config, sizes)
    got = program(jax.device_put(tiny.weights(config), weights), *batch())

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1e-3))

    jax.tree.map(close, got, on_one_device(config))


def test_experts_are_cut_over_tensor_and_never_gathered_along_it():
    config = MODEL.replace(experts=8, ffn=12)
    weights, program = on_mesh(config, (1, 2, 4))
    assert weights["blocks"]["gate"].shard_shape((2, 8, 32, 12)) == (2, 2, 16, 12)
    text = program.lower(transformer.abstract(config), *batch()).compile().as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text))
    assert gathered & {"2,32,12", "1,2,32,12"}, "gathers its own experts along fsdp"
    assert not any(re.fullmatch(r"(1,)?8,(32,12|12,32)", shape) for shape in gathered)


def test_experts_are_spread_over_fsdp_and_tensor_while_tokens_are_decoded():
    config = MODEL.replace(experts=8, ffn=12)
    weights, _ = on_mesh(config, (1, 4, 2))
    mesh = weights["final_norm"].mesh
    unstack = jax.jit(
        sharding.on(mesh, functools.partial(cache.unstack, config, rows=8)), in_shardings=(weights,)
    )
    compiled = unstack.lower(transformer.abstract(config)).compile()
    for layer in compiled.output_shardings["layers"]:
        assert layer["gate"].shard_shape((8, 32, 12)) == (1, 32, 12)
        assert layer["down"].shard_shape((8, 12, 32)) == (1, 12, 32)


@pytest.mark.parametrize("experts", [8, 6])  # four devices hold two each, or all six
def test_a_mesh_samples_what_one_device_samples(experts):
    config = MODEL.replace(experts=experts)
    sampling = rollout.Sampling(max_tokens=5)

    def sample(params, tokens_BP, mask_BP, key):
        return rollout.sample(config, params, tokens_BP, mask_BP, key, sampling).tokens_BL

    args = tiny.weights(config), *batch(), jax.random.key(0)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    got = jax.jit(sharding.on(mesh, sample), in_shardings=(on_mesh(config, (2, 2, 2))[0], *[None] * 3))(*args)
    np.testing.assert_array_equal(got, jax.jit(sample)(*args))


def test_a_blocks_load_counts_real_tokens_alone():
    p, x_BLD = block_weights()
    mask_BL = np.arange(5)[None] >= [[2], [0]]
    load = moe.block_load(MODEL, moe.route(MODEL, p["router"], x_BLD), mask_BL)
    logit_E8 = x_BLD[mask_BL].astype(np.float64) @ np.asarray(p["router"], np.float64)
    probability_8E = np.exp(logit_E8) / np.exp(logit_E8).sum(axis=1, keepdims=True)
    best_8X = np.argsort(-probability_8E, axis=1)[:, : MODEL.experts_per_token]
    assert load.tokens == 8
    assert load.rows_NE.tolist() == np.bincount(best_8X.ravel(), minlength=MODEL.experts).tolist()
    np.testing.assert_allclose(load.entropy_N, -(probability_8E * np.log(probability_8E)).sum(), rtol=1e-6)


def test_statistics_of_a_load_made_by_hand():
    load = moe.Load(
        rows_NE=jnp.array([[8, 0, 0, 0], [2, 2, 2, 2]]),
        entropy_N=jnp.array([2.0, 6.0]),
        tokens=jnp.int32(4),
    )
    assert jax.tree.map(float, moe.statistics(load)) == {"peak": 2.5, "idle": 0.375, "entropy": 1.0}


def test_a_mesh_counts_the_load_of_one_device():
    config = MODEL.replace(experts=8)

    def load(params, tokens_BL, mask_BL):
        return transformer.forward_and_load(
            config, params, tokens_BL, mask_BL, transformer.positions(mask_BL)
        )[1]

    args = tiny.weights(config), *batch()
    want = jax.jit(load)(*args)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    weights, _ = on_mesh(config, (2, 2, 2))
    got = jax.jit(sharding.on(mesh, load), in_shardings=(weights, *[sharding.batch(mesh)] * 2))(*args)
    assert want.rows_NE.sum(axis=1).tolist() == [batch()[1].sum() * config.experts_per_token] * config.layers
    np.testing.assert_array_equal(got.rows_NE, want.rows_NE)
    np.testing.assert_allclose(got.entropy_N, want.entropy_N, rtol=1e-5)
