"""The mixture of experts against loops over tokens and experts, its gradient, its mesh and its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import rollout, sharding
from opd_jax.models import moe, transformer
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

feed_forward = jax.jit(moe.feed_forward, static_argnums=0)
forward_with_router = jax.jit(transformer.forward_with_router, static_argnums=0)


def block_weights(seed=0):
    """The first block's weights, and hidden states for it."""
    p = jax.tree.map(lambda w: w[0], tiny.weights(MODEL, seed)["blocks"])
    return p, np.random.default_rng(seed).normal(size=(2, 5, MODEL.width)).astype(np.float32)


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
    out_BLD, routing = feed_forward(config, p, x_BLD)
    for b, l in np.ndindex(2, 5):
        want_D, chosen = one_token(config, p, x_BLD[b, l].astype(np.float64))
        np.testing.assert_allclose(out_BLD[b, l], want_D, atol=1e-5)
        assert routing.expert_BLX[b, l].tolist() == chosen


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    p, x_BLD = block_weights()
    x_BLD = np.abs(x_BLD)
    p["router"] = jnp.zeros_like(p["router"]).at[:, [1, 4]].set(1.0)
    out_BLD, routing = feed_forward(MODEL, p, x_BLD)
    assert set(np.unique(routing.expert_BLX)) == {1, 4}
    for b, l in np.ndindex(2, 5):
        np.testing.assert_allclose(out_BLD[b, l], one_token(MODEL, p, x_BLD[b, l])[0], atol=1e-5)


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
        return (moe.feed_forward(config, p, x_BLD)[0] * probe_BLD).sum()

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
    hidden_BLD, _ = forward_with_router(MODEL, params, written.tokens_BL, mask_BL)
    logits_BTV = transformer.logits(MODEL, transformer.head(MODEL, params), hidden_BLD[:, 6:-1])
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    logp_BT = np.take_along_axis(np.asarray(logp_BTV), np.asarray(written.response_BT)[..., None], -1)
    np.testing.assert_allclose(written.logp_BT, logp_BT[..., 0], atol=1e-4)


def test_router_statistics_count_real_tokens_alone_and_carry_no_gradient():
    tokens_BL, mask_BL = batch()
    params = tiny.weights(MODEL)
    hidden_BLD, stats = forward_with_router(MODEL, params, tokens_BL, mask_BL)
    np.testing.assert_array_equal(
        hidden_BLD, jax.jit(transformer.forward, static_argnums=0)(MODEL, params, tokens_BL, mask_BL)
    )
    p, x_BLD = block_weights()
    _, routing = feed_forward(MODEL, p, np.tile(x_BLD, (4, 2, 1))[:, :7])
    one = moe.statistics(routing, mask_BL)
    chosen = np.asarray(routing.expert_BLX)[mask_BL].reshape(-1)
    share_E = np.bincount(chosen, minlength=6) / len(chosen)
    np.testing.assert_allclose(one.load_NE, share_E, atol=1e-6)
    probability = np.asarray(routing.probability_BLE)[mask_BL]
    entropy = -(probability * np.log(probability)).sum(axis=-1).mean()
    np.testing.assert_allclose(one.entropy_N, entropy, atol=1e-5)
    assert stats.load_NE.shape == (2, 6)
    np.testing.assert_allclose(stats.load_NE.sum(axis=-1), 1, atol=1e-6)

    def entropy_of(params):
        return moe.metrics(forward_with_router(MODEL, params, tokens_BL, mask_BL)[1])["router_entropy"]

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(entropy_of))(params)))


def test_router_metrics_of_an_even_and_of_a_one_sided_router():
    even = moe.RouterStatistics(jnp.full((2, 4), 0.25), jnp.full(2, jnp.log(4.0)))
    named = {name: float(value) for name, value in moe.metrics(even).items()}
    assert named == pytest.approx({"router_entropy": 1.386294, "router_max_load": 1, "router_idle_share": 0})
    one_way = moe.RouterStatistics(jnp.array([[0.5, 0.5, 0, 0]]), jnp.zeros(1))
    named = {name: float(value) for name, value in moe.metrics(one_way).items()}
    assert named == pytest.approx({"router_entropy": 0, "router_max_load": 2, "router_idle_share": 0.5})


def test_a_dense_model_has_no_router_statistics():
    dense = tiny.STUDENT
    tokens = np.ones((1, 3), np.int32)
    assert forward_with_router(dense, tiny.weights(dense), tokens, tokens > 0)[1] is None


def test_experts_cut_over_a_mesh_give_the_values_and_gradients_of_one_device():
    tokens_BL, mask_BL = batch()
    params = jax.tree.map(jnp.asarray, tiny.weights(MODEL))

    def loss(params, tokens_BL, mask_BL):
        hidden_BLD = transformer.forward(MODEL, params, tokens_BL, mask_BL, remat="full")
        return jnp.where(mask_BL[..., None], hidden_BLD, 0).sum(axis=-1).var()

    want = jax.jit(jax.value_and_grad(loss))(params, tokens_BL, mask_BL)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    abstract, axes = transformer.abstract(MODEL), transformer.logical_axes(MODEL)
    weights = sharding.param_shardings(mesh, abstract, axes)
    assert weights["blocks"]["gate"].shard_shape((2, 6, 32, 12)) == (2, 3, 16, 12)
    rows = sharding.batch(mesh)
    on_mesh = jax.jit(jax.value_and_grad(loss), in_shardings=(weights, rows, rows))
    got = on_mesh(jax.device_put(params, weights), tokens_BL, mask_BL)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1e-3))

    jax.tree.map(close, got, want)
