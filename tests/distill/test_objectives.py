"""Every objective in chunks against direct unchunked ones, finite differences, and its memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import loss, objectives, scoring
from opd_jax.distill.types import Ends, LossInputs, Rollouts, Targets, TeacherTop
from opd_jax.models import transformer
from opd_jax.parallel import shard_rows
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
        options = objectives.Options(clip_ratio=clip_ratio)
        summed = loss.Loss("policy_gradient", options, config, None, chunk, remat)
        return summed(params, LossInputs(rollouts, advantage_BT, weight_BT), {}, None, 1.0)[0]

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
        topk_logp_BTK=np.zeros((B, T, 4), np.float32),
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
    score = jax.jit(lambda params, r: scoring.score(TIED, params, r, scoring.Scoring(T)).teacher_logp_BT)
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
    summed = loss.Loss("policy_gradient", objectives.Options(), TIED, None, chunk=4)
    plain = jax.jit(lambda params: summed(params, LossInputs(*batch()), {}, None, 1.0)[0])
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
    _, clipped = value_and_grad(TIED, 4, CLIP, "none", tiny.weights(TIED), r, advantage_BT, weight_BT)
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


def two_ids(logp_T, advantage_T):
    """Tokens of one response in a vocabulary of two; the student gave each a probability of 1/4 before."""
    logits_BTV = jnp.stack([logp_T, jnp.log1p(-jnp.exp(logp_T))], axis=-1)[None]
    old_logp_BT = jnp.full((1, len(logp_T)), np.log(0.25), jnp.float32)
    return objectives.Tokens(logits_BTV, jnp.zeros((1, len(logp_T)), int), old_logp_BT, advantage_T[None])


def test_per_token_clipped_loss_matches_ppo_by_hand():
    ratio = np.array([0.5, 0.9, 1.0, 1.1, 2.0] * 2, np.float32)
    advantage = np.array([1.0] * 5 + [-1.0] * 5, np.float32)
    want = -np.array([0.5, 0.9, 1.0, 1.1, 1.2, -0.8, -0.9, -1.0, -1.1, -2.0])
    got = objectives.policy_gradient(two_ids(jnp.log(ratio / 4), advantage), objectives.Options(CLIP))
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_no_gradient_flows_through_the_advantage():
    def total(advantage_T):
        return objectives.policy_gradient(two_ids(-jnp.ones(3), advantage_T), objectives.Options()).sum()

    assert not jax.grad(total)(jnp.arange(3.0)).any()


def test_micro_batches_of_unequal_lengths_add_up_to_the_whole_batch():
    params, (r, advantage_BT, weight_BT) = tiny.weights(TIED), batch()
    value, grads = value_and_grad(TIED, 4, None, "none", params, r, advantage_BT, weight_BT)
    pieces = shard_rows.split((r, advantage_BT, weight_BT), 2)
    halves = [jax.tree.map(lambda x, i=i: x[i], pieces) for i in range(2)]
    tokens = [half[0].mask_BT.sum() for half in halves]
    assert tokens[0] != tokens[1] and sum(tokens) == r.mask_BT.sum()
    parts = [value_and_grad(TIED, 4, None, "none", params, *half) for half in halves]
    summed = jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(summed[0] / sum(tokens), value / r.mask_BT.sum(), rtol=1e-5)
    assert_trees_close(summed[1], grads, 1e-5)


# From here on, every objective on given hidden states. As in a real pair the teacher has another width
# and more vocabulary rows, and the same ids.
TEACHER = UNTIED.replace(vocab_size=V + 16, width=48)
TOP_K = 5
NAMES = sorted(objectives.OBJECTIVES)
OPTIONS = objectives.Options(beta=0.3, entropy_threshold=3.5)
ENDS = (5, 40)


def log_softmax(logits_BTV):
    return logits_BTV - np.logaddexp.reduce(logits_BTV, axis=-1, keepdims=True)


@functools.cache
def states():
    """((student's head, hidden), (teacher's head, hidden)), float32."""
    rng = np.random.default_rng(11)

    def pair(model):
        head_VD = 1.5 * rng.normal(size=(model.vocab_size, model.width)) * model.width**-0.5
        return head_VD.astype(np.float32), rng.normal(size=(B, T, model.width)).astype(np.float32)

    return pair(TIED), pair(TEACHER)


def whole(model, head_VD, hidden_BTD):
    """float64 log-probabilities of the existing ids."""
    return log_softmax(np.float64(hidden_BTD) @ np.float64(head_VD)[: model.valid_vocab].T)


def targets_of(name, teacher):
    """What scoring keeps for the objective, from float64 log-probabilities."""
    kind = objectives.OBJECTIVES[name].teacher
    if kind == "logits":
        return Targets(hidden_BTD=teacher[1])
    if kind is None:
        return Targets()
    logp_BTV = whole(TEACHER, *teacher)
    order_BTV = np.argsort(-logp_BTV, axis=-1)
    ranked_BTV = np.take_along_axis(logp_BTV, order_BTV, axis=-1)
    rest_BT1 = np.logaddexp.reduce(ranked_BTV[..., TOP_K:], axis=-1, keepdims=True)
    return Targets(
        top=TeacherTop(
            top_BTK=order_BTV[..., :TOP_K].astype(np.int32),
            logp_BTK=np.concatenate([ranked_BTV[..., :TOP_K], rest_BT1], -1).astype(np.float32),
            entropy_BT=-(np.exp(logp_BTV) * logp_BTV).sum(-1).astype(np.float32),
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def head_value_and_grad(
    name, options, chunk, student, teacher_head_VD, targets, rollouts, advantage_BT, weight_BT, ends=None
):
    def total(student):
        summed = loss.Loss(name, options, TIED.replace(eos_ids=ENDS), TEACHER, chunk)
        inputs = LossInputs(rollouts, advantage_BT, weight_BT, targets, ends)
        return loss.chunked_sum(
            summed.of_chunk, chunk, *student, inputs.per_token, loss.Shared(teacher_head_VD)
        )

    return jax.value_and_grad(total)(student)


def of(name, *, chunk=4, options=OPTIONS, student=None, teacher=None, data=None):
    """(value, (gradient of the head, of the hidden states)) of an objective on `batch`.

    `data` is as `batch`'s, and may end in Ends.
    """
    student, teacher = student or states()[0], teacher or states()[1]
    targets = targets_of(name, teacher)
    return head_value_and_grad(name, options, chunk, student, teacher[0], targets, *(data or batch()))


def reference(name, student):
    """The weighted sum in float64 over whole [B, T, V] arrays, and its gradient in the logits."""
    r, advantage_BT, weight_BT = batch()
    logs_BTV, logt_BTV = whole(TIED, *student), whole(TEACHER, *states()[1])
    s_BTV, t_BTV = np.exp(logs_BTV), np.exp(logt_BTV)
    chosen_BTV = np.eye(TIED.valid_vocab)[r.response_BT]
    logp_BT = (chosen_BTV * logs_BTV).sum(-1)
    ranks_BTV = np.argsort(np.argsort(-logt_BTV, axis=-1), axis=-1)
    top_BTV = ranks_BTV < TOP_K
    grouped_BT = 0
    for part_BTV in [ranks_BTV == k for k in range(TOP_K)] + [~top_BTV]:
        s_BT, t_BT = ((part_BTV * p_BTV).sum(-1) for p_BTV in (s_BTV, t_BTV))
        grouped_BT = grouped_BT + t_BT * np.log(t_BT / s_BT)
    entropy_BT = -(t_BTV * logt_BTV).sum(-1)
    m_BTV = OPTIONS.beta * t_BTV + (1 - OPTIONS.beta) * s_BTV
    gradient_BT = -advantage_BT * logp_BT
    loss_BT = {
        "policy_gradient": gradient_BT,
        "sft": -logp_BT,
        "reverse_kl": (s_BTV * (logs_BTV - logt_BTV)).sum(-1),
        "forward_kl": (t_BTV * (logt_BTV - logs_BTV)).sum(-1),
        "jsd": OPTIONS.beta * (t_BTV * np.log(t_BTV / m_BTV)).sum(-1)
        + (1 - OPTIONS.beta) * (s_BTV * np.log(s_BTV / m_BTV)).sum(-1),
        "eopd": gradient_BT + (entropy_BT > OPTIONS.entropy_threshold) * grouped_BT,
        "aopd": np.where(advantage_BT > 0, gradient_BT, grouped_BT),
    }[name]
    return (weight_BT * loss_BT).sum()


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_is_the_float64_sum_over_whole_logits(name, chunk):
    value, _ = of(name, chunk=chunk)
    np.testing.assert_allclose(value, reference(name, states()[0]), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_is_the_float64_central_difference(name):
    """Along random directions of the head and of the hidden states."""
    _, grads = of(name)
    rng = np.random.default_rng(4)
    step = 1e-5
    student = [np.float64(x) for x in states()[0]]
    for which in (0, 1):
        for _ in range(3):
            nudge = rng.normal(size=student[which].shape)
            up, down = (
                [x + sign * step * nudge if n == which else x for n, x in enumerate(student)]
                for sign in (1, -1)
            )
            difference = (reference(name, up) - reference(name, down)) / (2 * step)
            product = np.vdot(np.float64(grads[which]), nudge)
            np.testing.assert_allclose(product, difference, rtol=2e-5, atol=2e-5)


def ends(weight=0.7):
    """Ends with `weight` at every position of `batch`, released ones too, and the teacher's probability."""
    stop_BT = np.exp(whole(TEACHER, *states()[1]))[..., list(ENDS)].sum(-1)
    mask_BT = batch()[0].mask_BT
    return Ends(
        weight_BT=np.where(mask_BT, weight, 0).astype(np.float32),
        stop_BT=np.where(mask_BT, stop_BT, 0).astype(np.float32),
    )


def ends_reference(student):
    """0.7 x the sum over the response of the forward KL between two coins, in float64."""
    s_BT, t_BT = (
        np.exp(whole(model, *of))[..., list(ENDS)].sum(-1)
        for model, of in ((TIED, student), (TEACHER, states()[1]))
    )
    kl_BT = t_BT * np.log(t_BT / s_BT) + (1 - t_BT) * np.log((1 - t_BT) / (1 - s_BT))
    return 0.7 * kl_BT[batch()[0].mask_BT].sum()


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_ends_add_the_float64_kl_of_two_coins_to_every_objective(name, chunk):
    """Value, and gradient against central differences along random directions."""
    plain = of(name, chunk=chunk)
    both = of(name, chunk=chunk, data=(*batch(), ends()))
    added = jax.tree.map(lambda a, b: np.float64(a - b), both, plain)
    student = [np.float64(x) for x in states()[0]]
    np.testing.assert_allclose(added[0], ends_reference(student), rtol=1e-4)
    rng = np.random.default_rng(6)
    step = 1e-5
    for which in (0, 1):
        nudge = rng.normal(size=student[which].shape)
        up, down = (
            ends_reference([x + sign * step * nudge if n == which else x for n, x in enumerate(student)])
            for sign in (1, -1)
        )
        np.testing.assert_allclose(np.vdot(added[1][which], nudge), (up - down) / (2 * step), atol=2e-4)


def test_ends_are_taught_where_the_rule_releases_and_nowhere_outside_the_response():
    r, advantage_BT, weight_BT = batch()
    nothing_BT = np.zeros_like(weight_BT)
    _, (_, hidden_BTD) = of("reverse_kl", data=(r, advantage_BT, nothing_BT, ends()))
    taught_BT = np.asarray(hidden_BTD).any(axis=-1)
    np.testing.assert_array_equal(taught_BT, r.mask_BT)


def test_a_weight_of_zero_on_ends_changes_no_bit():
    for name in NAMES:
        without, zero = of(name), of(name, data=(*batch(), ends(weight=0)))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, without, zero)))


def test_the_objectives_of_these_tests_take_both_their_branches():
    entropy_BT = targets_of("eopd", states()[1]).top.entropy_BT
    on_BT = batch()[2] > 0
    for above_BT in (entropy_BT > OPTIONS.entropy_threshold, batch()[1] > 0):
        assert 0 < above_BT[on_BT].sum() < on_BT.sum()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "eopd", "aopd"])
def test_student_equal_to_teacher_gives_zero_loss_and_zero_gradient(name):
    """The student is the teacher's width here, and A is 0, as it is for equal models."""
    r, advantage_BT, weight_BT = batch()
    teacher = states()[1]
    student = teacher[0][:V], teacher[1]
    data = r, np.zeros_like(advantage_BT), weight_BT
    out = of(name, student=student, teacher=teacher, data=data)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(out)) < 1e-5
    other = of(name, student=(student[0], 0.9 * student[1]), teacher=teacher, data=data)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(other)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_released_and_absent_positions_have_no_influence(name):
    """Weight 0 after a cut and past the end: whatever stands there, the sum is that of the rest."""
    r, advantage_BT, weight_BT = batch()
    out_BT = weight_BT == 0
    noise_BT = np.where(out_BT, 50.0, advantage_BT).astype(np.float32)
    other_BT = np.where(out_BT, 7, r.response_BT).astype(np.int32)
    other = r.replace(tokens_BL=np.concatenate([r.tokens_BL[:, :P], other_BT], axis=1))
    assert_trees_close(of(name, data=(other, noise_BT, weight_BT)), of(name), 1e-6)
    nothing = of(name, data=(r, advantage_BT, np.zeros_like(weight_BT)))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("name", NAMES)
def test_a_pad_id_that_has_no_logit_leaves_value_and_gradient_as_they_are(name):
    r, advantage_BT, weight_BT = batch()
    assert not r.mask_BT.all()
    padded_BT = np.where(r.mask_BT, r.response_BT, TIED.vocab_size - 1).astype(np.int32)  # past valid_vocab
    other = r.replace(tokens_BL=np.concatenate([r.tokens_BL[:, :P], padded_BT], axis=1))
    assert_trees_close(of(name, data=(other, advantage_BT, weight_BT)), of(name), 0)


@pytest.mark.parametrize("name", ["policy_gradient", "eopd", "aopd"])
def test_clipping_stops_the_gradient_of_tokens_past_the_clip_in_every_objective_with_advantages(name):
    r, advantage_BT, weight_BT = batch()
    logp_BTV = whole(TIED, *states()[0])
    logp_BT = np.take_along_axis(logp_BTV, r.response_BT[..., None], axis=-1)[..., 0]
    data = np.abs(advantage_BT) + np.float32(0.1), weight_BT
    for ratio, moves in ((np.e, False), (1.0, True)):
        old = r.replace(logp_BT=(logp_BT - np.log(ratio)).astype(np.float32))
        options = objectives.Options(entropy_threshold=1e9, clip_ratio=CLIP)
        _, grads = of(name, options=options, data=(old, *data))
        assert all(np.asarray(leaf).any() == moves for leaf in jax.tree.leaves(grads))


def test_the_advantage_is_clipped_before_the_centred_reward_is_added():
    advantage_BT = np.array([[-9.0, 0.5], [3.0, 1.0], [0.25, -1.0]], np.float32)
    reward_B = np.array([1.0, 0.0, np.nan], np.float32)
    got = loss.advantage(advantage_BT, 2.0, 4.0, reward_B)
    np.testing.assert_allclose(got, [[0.0, 2.5], [0.0, -1.0], [0.25, -1.0]])
    np.testing.assert_array_equal(loss.advantage(advantage_BT, 0.0), advantage_BT)
    all_ungraded = loss.advantage(advantage_BT, 0.0, 4.0, np.full(3, np.nan, np.float32))
    np.testing.assert_array_equal(all_ungraded, advantage_BT)


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_importance_weights_give_the_policys_own_gradient_from_other_draws(temperature):
    """Over all ids of one position, each as often as it is drawn; without weights the gradient is another."""
    rng = np.random.default_rng(8)
    logits_V, advantage_V = rng.normal(size=V), rng.normal(size=V)
    logp_V, behaviour_V = log_softmax(logits_V), log_softmax(logits_V / temperature)
    score_VV = np.eye(V) - np.exp(logp_V)  # gradient of log p(v) in the logits
    want_V = (np.exp(logp_V) * advantage_V) @ score_VV
    drawn_V = np.exp(behaviour_V) * advantage_V
    weight_V = np.float64(loss.importance(np.float32(logp_V), np.float32(behaviour_V), 1e9))
    np.testing.assert_allclose((drawn_V * weight_V) @ score_VV, want_V, atol=1e-6)
    assert np.abs(drawn_V @ score_VV - want_V).max() > 0.01
    capped_V = loss.importance(np.float32(logp_V), np.float32(behaviour_V), 1.2)
    np.testing.assert_allclose(capped_V, np.minimum(weight_V, 1.2), rtol=1e-6)


@pytest.mark.parametrize("taught", [False, True], ids=["", "ends"])
@pytest.mark.parametrize("name", NAMES)
def test_no_objective_ever_holds_logits_of_the_whole_response(name, taught):
    b, t, v, d, chunk = 4, 128, 8192, 16, 8
    config = TIED.replace(vocab_size=v, valid_vocab=v - 3, width=d)

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    kind = objectives.OBJECTIVES[name].teacher
    top = TeacherTop(
        top_BTK=shaped(b, t, TOP_K, dtype=jnp.int32),
        logp_BTK=shaped(b, t, TOP_K + 1),
        entropy_BT=shaped(b, t),
    )
    targets = Targets(
        hidden_BTD=shaped(b, t, d) if kind == "logits" else None, top=top if kind == "top" else None
    )
    r = Rollouts(
        tokens_BL=shaped(b, 4 + t, dtype=jnp.int32),
        prompt_mask_BP=shaped(b, 4, dtype=bool),
        mask_BT=shaped(b, t, dtype=bool),
        logp_BT=shaped(b, t),
        behaviour_logp_BT=shaped(b, t),
        topk_BTK=shaped(b, t, 4, dtype=jnp.int32),
        topk_logp_BTK=shaped(b, t, 4),
        stop_BT=shaped(b, t),
        finished_B=shaped(b, dtype=bool),
    )

    def step(student, teacher_head_VD, targets, r, advantage_BT, weight_BT, ends):
        def total(student):
            options = objectives.Options(clip_ratio=CLIP)
            summed = loss.Loss(name, options, config.replace(eos_ids=ENDS), config, chunk)
            inputs = LossInputs(r, advantage_BT, weight_BT, targets, ends)
            return loss.chunked_sum(
                summed.of_chunk, chunk, *student, inputs.per_token, loss.Shared(teacher_head_VD)
            )

        return jax.value_and_grad(total)(student)

    student = shaped(v, d), shaped(b, t, d)
    ends = Ends(weight_BT=shaped(b, t), stop_BT=shaped(b, t)) if taught else None
    args = student, shaped(v, d), targets, r, shaped(b, t), shaped(b, t), ends
    compiled = jax.jit(step).lower(*args).compile()
    largest = max(
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", compiled.as_text())
    )
    assert b * chunk * v <= largest < b * t * v
    assert compiled.memory_analysis().temp_size_in_bytes < b * t * v * 4 / 3
