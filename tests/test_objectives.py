"""Every objective in chunks against direct unchunked ones, finite differences, and its memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives, scoring
from opd_jax.models import transformer
from opd_jax.rollout import Rollouts
from tests import tiny

B, P, T, V = 4, 5, 11, 96
TIED = tiny.STUDENT.replace(
    family="qwen3",
    qk_norm=True,
    vocab_size=V,
    valid_vocab=V - 6,
    eos_ids=(),
    pad_id=0,
)
UNTIED = TIED.replace(tie_embeddings=False)
CLIP = 0.2


def _value_and_grad(config, chunk, clip_ratio, remat, params, rollouts, advantage_BT, weight_BT):
    def total(params):
        return objectives.loss_sum(
            "policy_gradient",
            objectives.Options(clip_ratio=clip_ratio),
            config,
            params,
            rollouts,
            advantage_BT,
            weight_BT,
            chunk=chunk,
            remat=remat,
        )

    return jax.value_and_grad(total)(params)


value_and_grad = jax.jit(_value_and_grad, static_argnums=(0, 1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def direct_value_and_grad(config, clip_ratio, params, rollouts, advantage_BT, weight_BT):
    """The same objective written straight down: whole logits, log_softmax, automatic gradient."""

    def total(params):
        logp_BTV = whole_logp(config, params, rollouts)
        logp_BT = jnp.take_along_axis(logp_BTV, rollouts.response_BT[..., None], axis=-1)[..., 0]
        target_BT = advantage_BT * weight_BT
        if clip_ratio is None:
            return -(target_BT * logp_BT).sum()
        ratio_BT = jnp.exp(logp_BT - rollouts.logp_BT)
        clipped_BT = jnp.where(
            target_BT > 0,
            jnp.minimum(ratio_BT, 1 + clip_ratio),
            jnp.maximum(ratio_BT, 1 - clip_ratio),
        )
        return -(target_BT * clipped_BT).sum()

    return jax.value_and_grad(total)(params)


def whole_logp(config, params, rollouts):
    """log_softmax of the whole [B, T, V] logits, without the absent ids."""
    mask_BL = jnp.concatenate([rollouts.prompt_mask_BP, rollouts.mask_BT], axis=1)
    hidden_BLD = transformer.forward(config, params, rollouts.tokens_BL, mask_BL)
    table_VD = params["embedding"] if config.tie_embeddings else params["head"]
    return jax.nn.log_softmax((hidden_BLD @ table_VD.T)[:, P - 1 : -1, : config.valid_vocab])


@functools.cache
def batch():
    """(rollouts, advantage_BT, weight_BT): ragged, weights 0 outside the response and after a cut."""
    rng = np.random.default_rng(3)
    mask_BT = np.arange(T)[None] < np.array([[T], [7], [1], [4]])
    kept_BT = np.arange(T)[None] < np.array([[6], [7], [1], [2]])
    zeros_BT = np.zeros((B, T), np.float32)
    r = Rollouts(
        tokens_BL=rng.integers(0, TIED.valid_vocab, (B, P + T)).astype(np.int32),
        prompt_mask_BP=np.arange(P)[None] >= np.array([[0], [2], [4], [1]]),
        mask_BT=mask_BT,
        logp_BT=zeros_BT,
        behaviour_logp_BT=zeros_BT,
        topk_BTK=np.zeros((B, T, 4), np.int32),
        stop_BT=zeros_BT,
        finished_B=np.zeros(B, bool),
    )
    advantage_BT = np.where(mask_BT, rng.normal(size=(B, T)), 0).astype(np.float32)
    weight_BT = np.where(kept_BT, rng.uniform(0.5, 2, (B, T)), 0).astype(np.float32)
    return r, advantage_BT, weight_BT


@functools.cache
def student_logp():
    """The student's own logp_BT, 0 outside the response: p_old of the clipped form at ratio 1."""
    r = batch()[0]
    score = jax.jit(lambda params, r: scoring.score(TIED, params, r, chunk=T).teacher_logp_BT)
    return np.asarray(score(tiny.weights(TIED), r))


def assert_trees_close(got, want, relative):
    """Every leaf within `relative` of its own largest entry."""

    def close(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(
            a, b, atol=relative * np.abs(b).max(), rtol=0, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize(
    "config, chunk", [(TIED, 4), (UNTIED, 4), (TIED, 64)], ids=["tied", "untied", "one chunk"]
)
def test_chunked_gradient_equals_the_direct_one_for_every_parameter(config, chunk):
    params = tiny.weights(config)
    value, grads = value_and_grad(config, chunk, None, "none", params, *batch())
    want_value, want_grads = direct_value_and_grad(config, None, params, *batch())
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want_grads))
    assert_trees_close(grads, want_grads, 1e-5)


def test_rematerialising_changes_no_gradient():
    want = value_and_grad(TIED, 4, None, "none", tiny.weights(TIED), *batch())
    assert_trees_close(value_and_grad(TIED, 4, None, "full", tiny.weights(TIED), *batch()), want, 1e-5)


def test_the_value_without_differentiation_is_the_same():
    plain = jax.jit(
        lambda params: objectives.loss_sum(
            "policy_gradient",
            objectives.Options(),
            TIED,
            params,
            *batch(),
            chunk=4,
            remat="none",
        )
    )
    want, _ = value_and_grad(TIED, 4, None, "none", tiny.weights(TIED), *batch())
    np.testing.assert_allclose(plain(tiny.weights(TIED)), want, rtol=1e-6)


@pytest.mark.parametrize("clip_ratio", [None, CLIP])
def test_zero_advantage_gives_exactly_zero_loss_and_gradient(clip_ratio):
    r, advantage_BT, weight_BT = batch()
    zero_BT = np.zeros_like(advantage_BT)
    out = value_and_grad(TIED, 4, clip_ratio, "none", tiny.weights(TIED), r, zero_BT, weight_BT)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(out))


def test_tokens_outside_the_response_have_no_influence():
    r, advantage_BT, weight_BT = batch()
    other_BT = np.where(r.mask_BT, r.response_BT, 7).astype(np.int32)
    other = r.replace(tokens_BL=np.concatenate([r.tokens_BL[:, :P], other_BT], axis=1))
    want = value_and_grad(TIED, 4, None, "none", tiny.weights(TIED), *batch())
    got = value_and_grad(TIED, 4, None, "none", tiny.weights(TIED), other, advantage_BT, weight_BT)
    assert_trees_close(got, want, 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_agrees_with_central_differences_along_random_directions(seed):
    params = tiny.weights(TIED)
    direction = tiny.weights(TIED, seed + 10)
    _, grads = value_and_grad(TIED, 4, None, "none", params, *batch())
    step = 2e-3

    def value(sign):
        moved = jax.tree.map(lambda w, d: w + sign * step * d, params, direction)
        return float(value_and_grad(TIED, 4, None, "none", moved, *batch())[0])

    difference = (value(1) - value(-1)) / (2 * step)
    products = jax.tree.map(lambda g, d: np.vdot(np.asarray(g, np.float64), d), grads, direction)
    np.testing.assert_allclose(difference, sum(jax.tree.leaves(products)), rtol=1e-2, atol=1e-2)


def test_clipped_form_has_the_plain_forms_gradient_at_ratio_one():
    r, advantage_BT, weight_BT = batch()
    r = r.replace(logp_BT=student_logp())
    _, plain = value_and_grad(TIED, 4, None, "none", tiny.weights(TIED), *batch())
    _, clipped = value_and_grad(
        TIED, 4, CLIP, "none", tiny.weights(TIED), r, advantage_BT, weight_BT
    )
    assert_trees_close(clipped, plain, 1e-4)


def test_clipped_gradient_equals_the_direct_one_away_from_ratio_one():
    r, advantage_BT, weight_BT = batch()
    shift_BT = np.random.default_rng(5).uniform(-0.5, 0.5, (B, T)).astype(np.float32)
    r = r.replace(logp_BT=np.where(r.mask_BT, student_logp() + shift_BT, 0).astype(np.float32))
    args = tiny.weights(TIED), r, advantage_BT, weight_BT
    got, want = value_and_grad(TIED, 4, CLIP, "none", *args), direct_value_and_grad(TIED, CLIP, *args)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_trees_close(got[1], want[1], 2e-5)


def test_tokens_past_the_clip_on_their_own_side_give_zero_gradient():
    # the ratio is e, and it moved where its advantage points; then e^-1 likewise
    for sign in (1, -1):
        r, advantage_BT, weight_BT = batch()
        r = r.replace(logp_BT=student_logp() - np.float32(sign))
        args = tiny.weights(TIED), r, sign * np.abs(advantage_BT), weight_BT
        _, grads = value_and_grad(TIED, 4, CLIP, "none", *args)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_per_token_clipped_loss_matches_ppo_by_hand():
    ratio = np.array([0.5, 0.9, 1.0, 1.1, 2.0] * 2, np.float32)
    advantage = np.array([1.0] * 5 + [-1.0] * 5, np.float32)
    want = -np.array([0.5, 0.9, 1.0, 1.1, 1.2, -0.8, -0.9, -1.0, -1.1, -2.0])
    got = objectives.surrogate(jnp.log(ratio), np.zeros(10, np.float32), advantage, CLIP)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_gradient_flows_through_the_advantage():
    def total(advantage_T):
        return objectives.surrogate(-jnp.ones(3), jnp.zeros(3), advantage_T, None).sum()

    assert not jax.grad(total)(jnp.arange(3.0)).any()


def test_micro_batches_of_unequal_lengths_add_up_to_the_whole_batch():
    params, (r, advantage_BT, weight_BT) = tiny.weights(TIED), batch()
    value, grads = value_and_grad(TIED, 4, None, "none", params, r, advantage_BT, weight_BT)
    pieces = scoring.split((r, advantage_BT, weight_BT), 2)
    halves = [jax.tree.map(lambda x, i=i: x[i], pieces) for i in range(2)]
    tokens = [half[0].mask_BT.sum() for half in halves]
    assert tokens[0] != tokens[1] and sum(tokens) == r.mask_BT.sum()
    parts = [value_and_grad(TIED, 4, None, "none", params, *half) for half in halves]
    summed = jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(summed[0] / sum(tokens), value / r.mask_BT.sum(), rtol=1e-5)
    assert_trees_close(summed[1], grads, 1e-5)


# As in a real pair: other width and depth, more vocabulary rows, the same ids.
TEACHER = UNTIED.replace(vocab_size=V + 16, width=48, layers=1)
TOP_K = 5
NAMES = sorted(objectives.OBJECTIVES)
OPTIONS = objectives.Options(beta=0.3, entropy_threshold=3.0, clip_ratio=None)


def scored(teacher, teacher_params, rollouts, name, chunk):
    return scoring.score(
        teacher,
        teacher_params,
        rollouts,
        chunk=chunk,
        keep=objectives.OBJECTIVES[name].teacher,
        top_k=TOP_K,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def objective_value_and_grad(
    name, options, teacher, chunk, teacher_params, params, rollouts, advantage_BT, weight_BT
):
    """As a training step does it: score, then the loss in chunks."""
    targets = scored(teacher, teacher_params, rollouts, name, chunk).targets

    def total(params):
        return objectives.loss_sum(
            name,
            options,
            TIED,
            params,
            rollouts,
            advantage_BT,
            weight_BT,
            chunk=chunk,
            remat="none",
            targets=targets,
            teacher=(teacher, transformer.head(teacher, teacher_params)),
        )

    return jax.value_and_grad(total)(params)


def direct_loss(name, logs_BTV, logt_BTV, token_BT, advantage_BT):
    """The per-token loss, written straight down on whole log-probabilities."""
    s_BTV, t_BTV = jnp.exp(logs_BTV), jnp.exp(logt_BTV)
    chosen_BT = jnp.take_along_axis(logs_BTV, token_BT[..., None], axis=-1)[..., 0]
    if name == "reverse_kl":
        return (s_BTV * (logs_BTV - logt_BTV)).sum(-1)
    if name == "forward_kl":
        return (t_BTV * (logt_BTV - logs_BTV)).sum(-1)
    if name == "jsd":
        m_BTV = OPTIONS.beta * t_BTV + (1 - OPTIONS.beta) * s_BTV
        teacher_kl, student_kl = ((p * jnp.log(p / m_BTV)).sum(-1) for p in (t_BTV, s_BTV))
        return OPTIONS.beta * teacher_kl + (1 - OPTIONS.beta) * student_kl
    if name == "sft":
        return -chosen_BT
    if name == "policy_gradient":
        return -advantage_BT * chosen_BT
    order_BTV = jnp.argsort(-logt_BTV, axis=-1)
    s_BTV, t_BTV = (jnp.take_along_axis(p, order_BTV, axis=-1) for p in (s_BTV, t_BTV))
    s_BTK, t_BTK = (
        jnp.concatenate([p[..., :TOP_K], p[..., TOP_K:].sum(-1, keepdims=True)], -1)
        for p in (s_BTV, t_BTV)
    )
    kl_BT = (t_BTK * jnp.log(t_BTK / s_BTK)).sum(-1)
    if name == "aopd":
        return jnp.where(advantage_BT > 0, -advantage_BT * chosen_BT, kl_BT)
    entropy_BT = -(t_BTV * jnp.log(t_BTV)).sum(-1)
    return -advantage_BT * chosen_BT + kl_BT * (entropy_BT > OPTIONS.entropy_threshold)


@functools.partial(jax.jit, static_argnums=0)
def objective_directly(name, teacher_params, params, rollouts, advantage_BT, weight_BT):
    logt_BTV = whole_logp(TEACHER, teacher_params, rollouts)

    def total(params):
        logs_BTV = whole_logp(TIED, params, rollouts)
        loss_BT = direct_loss(name, logs_BTV, logt_BTV, rollouts.response_BT, advantage_BT)
        return (weight_BT * loss_BT).sum()

    return jax.value_and_grad(total)(params)


def of(name, chunk=4, teacher=TEACHER, teacher_params=None, data=None):
    """(value, gradient) of an objective on `batch`."""
    teacher_params = tiny.weights(TEACHER, 1) if teacher_params is None else teacher_params
    return objective_value_and_grad(
        name, OPTIONS, teacher, chunk, teacher_params, tiny.weights(TIED), *(data or batch())
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_equals_the_one_written_over_whole_logits(name):
    value, grads = of(name)
    want_value, want = objective_directly(name, tiny.weights(TEACHER, 1), tiny.weights(TIED), *batch())
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want))
    assert_trees_close(grads, want, 1e-5)


def test_the_entropy_threshold_of_these_tests_divides_the_tokens():
    entropy_BT = scored(TEACHER, tiny.weights(TEACHER, 1), batch()[0], "eopd", T).targets.top.entropy_BT
    above = (entropy_BT > OPTIONS.entropy_threshold)[batch()[2] > 0]
    assert 0 < above.sum() < above.size


def test_the_kept_top_tokens_are_those_of_the_whole_vocabulary():
    top = scored(TEACHER, tiny.weights(TEACHER, 1), batch()[0], "aopd", 4).targets.top
    logp_BTV = np.asarray(whole_logp(TEACHER, tiny.weights(TEACHER, 1), batch()[0]), np.float64)
    np.testing.assert_array_equal(top.top_BTK, np.argsort(-logp_BTV, axis=-1)[..., :TOP_K])
    ranked_BTV = np.exp(-np.sort(-logp_BTV, axis=-1))
    np.testing.assert_allclose(np.exp(top.logp_BTK[..., :-1]), ranked_BTV[..., :TOP_K], rtol=1e-4)
    np.testing.assert_allclose(np.exp(top.logp_BTK).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(top.entropy_BT, -(ranked_BTV * np.log(ranked_BTV)).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_student_equal_to_teacher_gives_zero_loss_and_zero_gradient(name):
    value, grads = of(name, teacher=TIED, teacher_params=tiny.weights(TIED))
    np.testing.assert_allclose(value, 0, atol=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) < 1e-5


@pytest.mark.parametrize("name", ["eopd", "aopd"])
def test_student_equal_to_teacher_has_advantage_and_top_token_kl_zero(name):
    r, advantage_BT, weight_BT = batch()
    data = r, np.zeros_like(advantage_BT), weight_BT
    value, grads = of(name, teacher=TIED, teacher_params=tiny.weights(TIED), data=data)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_released_and_absent_positions_have_no_influence(name):
    """Weight 0 after a cut and past the end: whatever stands there, the sum is that of the rest."""
    r, advantage_BT, weight_BT = batch()
    noise_BT = np.where(weight_BT > 0, advantage_BT, 50.0).astype(np.float32)
    other_BT = np.where(r.mask_BT, r.response_BT, 7).astype(np.int32)
    other = r.replace(tokens_BL=np.concatenate([r.tokens_BL[:, :P], other_BT], axis=1))
    assert_trees_close(of(name, data=(other, noise_BT, weight_BT)), of(name), 1e-6)
    nothing = of(name, data=(r, advantage_BT, np.zeros_like(weight_BT)))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_one_by_one_add_up_to_the_whole_batch(name):
    pieces = scoring.split(batch(), B)
    parts = [of(name, data=jax.tree.map(lambda x, i=i: x[i], pieces)) for i in range(B)]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    assert_trees_close(summed, of(name), 1e-5)


def test_clipping_reaches_the_policy_gradient_inside_eopd_and_aopd():
    r, advantage_BT, weight_BT = batch()
    r = r.replace(logp_BT=student_logp() - np.float32(1))  # every ratio is e, past the clip
    options = objectives.Options(entropy_threshold=1e9, clip_ratio=CLIP)
    for name in ("eopd", "aopd"):
        _, grads = objective_value_and_grad(
            name,
            options,
            TEACHER,
            4,
            tiny.weights(TEACHER, 1),
            tiny.weights(TIED),
            r,
            np.abs(advantage_BT) + np.float32(0.1),
            weight_BT,
        )
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_the_advantage_is_clipped_before_the_centred_reward_is_added():
    advantage_BT = np.array([[-9.0, 0.5], [3.0, 1.0], [0.25, -1.0]], np.float32)
    reward_B = np.array([1.0, 0.0, np.nan], np.float32)
    got = objectives.advantage(advantage_BT, 2.0, 4.0, reward_B)
    np.testing.assert_allclose(got, [[0.0, 2.5], [0.0, -1.0], [0.25, -1.0]])
    np.testing.assert_array_equal(objectives.advantage(advantage_BT, 0.0), advantage_BT)
    all_ungraded = objectives.advantage(advantage_BT, 0.0, 4.0, np.full(3, np.nan, np.float32))
    np.testing.assert_array_equal(all_ungraded, advantage_BT)


@pytest.mark.parametrize("name", NAMES)
def test_no_objective_ever_holds_logits_of_the_whole_response(name):
    b, p, t, v, chunk = 4, 4, 128, 8192, 8
    config = TIED.replace(vocab_size=v, valid_vocab=v - 3, width=16)

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    r = Rollouts(
        tokens_BL=shaped(b, p + t, dtype=jnp.int32),
        prompt_mask_BP=shaped(b, p, dtype=bool),
        mask_BT=shaped(b, t, dtype=bool),
        logp_BT=shaped(b, t),
        behaviour_logp_BT=shaped(b, t),
        topk_BTK=shaped(b, t, 4, dtype=jnp.int32),
        stop_BT=shaped(b, t),
        finished_B=shaped(b, dtype=bool),
    )

    def step(teacher_params, params, r, advantage_BT, weight_BT):
        targets = scored(config, teacher_params, r, name, chunk).targets

        def total(params):
            return objectives.loss_sum(
                name,
                objectives.Options(clip_ratio=CLIP),
                config,
                params,
                r,
                advantage_BT,
                weight_BT,
                chunk=chunk,
                remat="full",
                targets=targets,
                teacher=(config, transformer.head(config, teacher_params)),
            )

        return jax.value_and_grad(total)(params)

    weights = transformer.abstract(config)
    compiled = jax.jit(step).lower(weights, weights, r, shaped(b, t), shaped(b, t)).compile()
    largest = max(
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", compiled.as_text())
    )
    assert b * chunk * v <= largest < b * t * v
    # attention's own buffers, free of V, are most of what is left
    assert compiled.memory_analysis().temp_size_in_bytes < b * t * v * 4
