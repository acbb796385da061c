"""Teacher scores and the exact divergence against full [B, T, V] float64 softmaxes, and their memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from opd_jax.distill import scoring
from opd_jax.distill.types import Rollouts
from opd_jax.models import transformer
from opd_jax.parallel import shard_rows
from tests import tiny

B, P, T, V, K, TOP_K = 4, 5, 11, 64, 4, 6
STUDENT = tiny.STUDENT.replace(
    vocab_size=V,
    valid_vocab=V - 3,
    eos_ids=(3, 7),
    pad_id=0,
)
# As in a real pair: other width and depth, more vocabulary rows, the same ids.
TEACHER = STUDENT.replace(vocab_size=V + 16, width=48, layers=1, tie_embeddings=False)

score = jax.jit(
    lambda teacher, teacher_params, rollouts, chunk, micro_batches=1: scoring.score(
        teacher, teacher_params, rollouts, scoring.Scoring(chunk, micro_batches)
    ),
    static_argnums=(0, 3, 4),
    compiler_options=tiny.OPTIMISED,
)
kept = jax.jit(
    lambda teacher, teacher_params, rollouts, keep, micro_batches: scoring.score(
        teacher, teacher_params, rollouts, scoring.Scoring(4, micro_batches, keep, TOP_K)
    ),
    static_argnums=(0, 3, 4),
    compiler_options=tiny.OPTIMISED,
)
distance = jax.jit(
    lambda student, student_params, teacher, teacher_params, rollouts, chunk: scoring.distance(
        student, student_params, teacher, teacher_params, rollouts, scoring.Scoring(chunk)
    ),
    static_argnums=(0, 2, 5),
)
forward_logits = jax.jit(
    lambda config, params, tokens_BL, mask_BL: transformer.logits(
        config,
        transformer.head(config, params),
        transformer.forward(config, params, tokens_BL, mask_BL),
    ),
    static_argnums=0,
)


def logits_of(config, params, tokens_BL, prompt_mask_BP, mask_BT):
    """float64 logits_BTV that predict the response, the whole vocabulary at once."""
    mask_BL = np.concatenate([prompt_mask_BP, mask_BT], axis=1)
    logits_BLV = forward_logits(config, params, tokens_BL, mask_BL)
    return np.asarray(logits_BLV)[:, P - 1 : -1].astype(np.float64)


def at(x_BTV, ids_BT):
    return np.take_along_axis(x_BTV, ids_BT[..., None], axis=-1)[..., 0]


@functools.cache
def rollouts():
    """Ragged rollouts of random tokens, with the student's true log-probabilities and candidates."""
    rng = np.random.default_rng(2)
    tokens_BL = rng.integers(0, STUDENT.valid_vocab, (B, P + T)).astype(np.int32)
    prompt_mask_BP = np.arange(P)[None] >= np.array([[0], [2], [4], [1]])
    mask_BT = np.arange(T)[None] < np.array([[T], [7], [1], [4]])
    logits_BTV = logits_of(STUDENT, tiny.weights(STUDENT), tokens_BL, prompt_mask_BP, mask_BT)
    logp_BTV = special.log_softmax(logits_BTV, axis=-1)
    logp_BT = at(logp_BTV, tokens_BL[:, P:])
    logp_BT = np.where(mask_BT, logp_BT, 0).astype(np.float32)
    topk_BTK = np.argsort(-logits_BTV, axis=-1)[..., :K].astype(np.int32)
    topk_logp_BTK = np.take_along_axis(logp_BTV, topk_BTK, axis=-1)
    return Rollouts(
        tokens_BL=tokens_BL,
        prompt_mask_BP=prompt_mask_BP,
        mask_BT=mask_BT,
        logp_BT=logp_BT,
        behaviour_logp_BT=logp_BT,
        topk_BTK=np.where(mask_BT[..., None], topk_BTK, 0),
        topk_logp_BTK=np.where(mask_BT[..., None], topk_logp_BTK, 0).astype(np.float32),
        stop_BT=np.zeros((B, T), np.float32),
        finished_B=np.zeros(B, bool),
    )


def whole_logits(config, params):
    r = rollouts()
    return logits_of(config, params, r.tokens_BL, r.prompt_mask_BP, r.mask_BT)


@functools.cache
def scored(chunk, micro_batches=1):
    return score(TEACHER, tiny.weights(TEACHER, 1), rollouts(), chunk, micro_batches)


def assert_scores_close(got, want, atol):
    got, want = (scores.replace(targets=None, computed=None) for scores in (got, want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.mark.parametrize("chunk", [4, 64])
def test_teacher_logp_is_its_log_softmax_over_the_whole_vocabulary(chunk):
    r = rollouts()
    logp_BTV = special.log_softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)
    want_BT = np.where(r.mask_BT, at(logp_BTV, r.response_BT), 0)
    np.testing.assert_allclose(scored(chunk).teacher_logp_BT, want_BT, atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 64])
def test_advantage_is_the_teachers_minus_the_students_logp(chunk):
    r = rollouts()
    logp_BTV = special.log_softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)
    want_BT = np.where(r.mask_BT, at(logp_BTV, r.response_BT) - r.logp_BT, 0)
    np.testing.assert_allclose(scored(chunk).advantage_BT, want_BT, atol=2e-5)
    np.testing.assert_array_equal(scored(chunk).student_logp_BT, r.logp_BT)


@pytest.mark.parametrize("chunk", [4, 64])
def test_contrast_is_the_teachers_margin_between_its_best_two_candidates(chunk):
    r = rollouts()
    logp_BTV = special.log_softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)
    ranked_BTK = np.sort(np.take_along_axis(logp_BTV, r.topk_BTK, axis=-1), axis=-1)
    want_BT = np.where(r.mask_BT, ranked_BTK[..., -1] - ranked_BTK[..., -2], 0)
    np.testing.assert_allclose(scored(chunk).contrast_BT, want_BT, atol=2e-5)
    assert (want_BT[r.mask_BT] > 0).all()


@pytest.mark.parametrize("chunk", [4, 64])
def test_both_models_log_probabilities_of_the_candidates_are_their_log_softmaxes(chunk):
    r = rollouts()
    for name, config, params in (
        ("student_topk_logp_BTK", STUDENT, tiny.weights(STUDENT)),
        ("teacher_topk_logp_BTK", TEACHER, tiny.weights(TEACHER, 1)),
    ):
        logp_BTV = special.log_softmax(whole_logits(config, params), axis=-1)
        want_BTK = np.take_along_axis(logp_BTV, r.topk_BTK, axis=-1)
        want_BTK = np.where(r.mask_BT[..., None], want_BTK, 0)
        np.testing.assert_allclose(getattr(scored(chunk), name), want_BTK, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [4, 64])
def test_overlap_is_the_share_of_candidates_among_the_teachers_best(chunk):
    r = rollouts()
    best_BTK = np.argsort(-whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)[..., :K]
    shared = [[len({*a} & {*b}) / K for a, b in zip(*row)] for row in zip(r.topk_BTK, best_BTK)]
    want_BT = np.where(r.mask_BT, shared, 0)
    np.testing.assert_array_equal(scored(chunk).overlap_BT, want_BT)
    assert len(np.unique(want_BT[r.mask_BT])) > 1


def test_the_teachers_stop_probability_is_its_softmax_at_the_end_tokens():
    r = rollouts()
    p_BTV = special.softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)
    want_BT = np.where(r.mask_BT, p_BTV[..., list(TEACHER.eos_ids)].sum(axis=-1), 0)
    np.testing.assert_allclose(scored(4).teacher_stop_BT, want_BT, rtol=2e-4, atol=1e-9)
    assert (want_BT[r.mask_BT] > 0).all()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_teachers_top_tokens_groups_and_entropy_come_with_the_scores(micro_batches):
    scores = kept(TEACHER, tiny.weights(TEACHER, 1), rollouts(), "top", micro_batches)
    top = scores.targets.top
    p_BTV = special.softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)
    ranked_BTV = -np.sort(-p_BTV, axis=-1)
    want_BTK = np.concatenate([ranked_BTV[..., :TOP_K], ranked_BTV[..., TOP_K:].sum(-1, keepdims=True)], -1)
    on_BT = rollouts().mask_BT  # elsewhere they have no meaning
    np.testing.assert_array_equal(top.top_BTK[on_BT], np.argsort(-p_BTV, axis=-1)[on_BT, :TOP_K])
    np.testing.assert_allclose(np.exp(top.logp_BTK[on_BT]), want_BTK[on_BT], rtol=2e-4)
    np.testing.assert_allclose(top.entropy_BT[on_BT], special.entr(p_BTV).sum(-1)[on_BT], rtol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(top))
    assert scores.targets.hidden_BTD is None
    assert_scores_close(scores, scored(4), atol=2e-6)


def test_the_kept_hidden_states_give_the_teachers_logits_without_another_forward_pass():
    scores = kept(TEACHER, tiny.weights(TEACHER, 1), rollouts(), "logits", 2)
    head_VD = transformer.head(TEACHER, tiny.weights(TEACHER, 1))
    got_BTV = transformer.logits(TEACHER, head_VD, scores.targets.hidden_BTD)
    want_BTV = whole_logits(TEACHER, tiny.weights(TEACHER, 1))
    on_BT = rollouts().mask_BT
    np.testing.assert_allclose(got_BTV[on_BT], want_BTV[on_BT], atol=1e-4)
    assert scores.targets.top is None


def test_outside_the_response_every_score_is_zero():
    past_BT = ~rollouts().mask_BT
    for x_BT in jax.tree.leaves(scored(4).replace(computed=None)):
        assert not np.asarray(x_BT)[past_BT].any()


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_scores(micro_batches):
    assert_scores_close(scored(4, micro_batches), scored(4), atol=2e-6)


def test_join_undoes_split_and_each_piece_has_rows_of_every_shard():
    x_BN = np.arange(24).reshape(8, 3)
    pieces = shard_rows.split(x_BN, 2)
    np.testing.assert_array_equal(shard_rows.join(pieces), x_BN)
    # batch rows 0-3 and 4-7 lie on two shards; both pieces hold two rows of each
    assert ((pieces[:, :, 0] // 3 < 4).sum(axis=1) == 2).all()


def test_recomputing_the_student_gives_the_samplers_scores():
    r = rollouts()
    blank = r.replace(
        logp_BT=np.full_like(r.logp_BT, 9),
        topk_BTK=np.zeros_like(r.topk_BTK),
        topk_logp_BTK=np.zeros_like(r.topk_logp_BTK),
    )
    recompute = jax.jit(
        lambda teacher_params, student_params, rollouts: scoring.score(
            TEACHER, teacher_params, rollouts, scoring.Scoring(4), (STUDENT, student_params)
        )
    )
    got = recompute(tiny.weights(TEACHER, 1), tiny.weights(STUDENT), blank)
    assert_scores_close(got, scored(4), atol=1e-4)


def test_student_equal_to_teacher_gives_zero_advantage():
    same = score(STUDENT, tiny.weights(STUDENT), rollouts(), 4)
    np.testing.assert_allclose(same.advantage_BT, 0, atol=2e-5)


def test_a_padded_teacher_vocabulary_changes_nothing():
    table_VD = tiny.weights(TEACHER, 1)
    rows = {n: table_VD[n][: STUDENT.vocab_size] for n in ("embedding", "head")}
    narrow = score(TEACHER.replace(vocab_size=V), table_VD | rows, rollouts(), 4)
    assert_scores_close(narrow, scored(4), atol=2e-6)


@pytest.mark.parametrize("chunk", [4, 64])
def test_reverse_kl_is_the_float64_sum_over_the_vocabulary(chunk):
    r = rollouts()
    p_BTV = special.softmax(whole_logits(STUDENT, tiny.weights(STUDENT)), axis=-1)
    q_BTV = special.softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)[..., :V]
    want_BT = np.where(r.mask_BT, special.rel_entr(p_BTV, q_BTV).sum(axis=-1), 0)
    got_BT, logp_BT = distance(STUDENT, tiny.weights(STUDENT), TEACHER, tiny.weights(TEACHER, 1), r, chunk)
    np.testing.assert_allclose(got_BT, want_BT, atol=2e-5)
    np.testing.assert_allclose(logp_BT, scored(4).teacher_logp_BT, atol=2e-6)


def test_reverse_kl_runs_with_a_student_of_more_rows_than_the_teacher():
    forth, _ = distance(TEACHER, tiny.weights(TEACHER, 1), STUDENT, tiny.weights(STUDENT), rollouts(), 4)
    q_BTV = special.softmax(whole_logits(STUDENT, tiny.weights(STUDENT)), axis=-1)
    p_BTV = special.softmax(whole_logits(TEACHER, tiny.weights(TEACHER, 1)), axis=-1)[..., :V]
    want_BT = np.where(rollouts().mask_BT, special.rel_entr(p_BTV, q_BTV).sum(axis=-1), 0)
    np.testing.assert_allclose(forth, want_BT, atol=2e-5)


def test_reverse_kl_of_equal_models_is_zero():
    same = tiny.weights(STUDENT)
    got_BT, _ = distance(STUDENT, same, STUDENT, same, rollouts(), 4)
    np.testing.assert_array_equal(got_BT, 0)


def test_token_logp_and_its_gradient_equal_those_of_log_softmax_with_absent_ids():
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(scale=3, size=(2, 3, 200)).astype(np.float32)
    logits_BTV[..., 190:] = -np.inf
    token_BT = rng.integers(0, 190, (2, 3))
    weight_BT = rng.normal(size=(2, 3)).astype(np.float32)

    def total(x_BTV):
        return (weight_BT * scoring.token_logp(x_BTV, token_BT)).sum()

    value, grad_BTV = jax.value_and_grad(total)(jnp.asarray(logits_BTV))
    logp_BTV = special.log_softmax(logits_BTV.astype(np.float64), axis=-1)
    np.testing.assert_allclose(value, (weight_BT * at(logp_BTV, token_BT)).sum(), rtol=1e-5)
    want_BTV = weight_BT[..., None] * (np.eye(200)[token_BT] - np.exp(logp_BTV))
    np.testing.assert_allclose(grad_BTV, want_BTV, atol=1e-6)


def test_scoring_never_holds_logits_of_the_whole_response():
    b, p, t, v = 4, 4, 128, 2048
    config = STUDENT.replace(vocab_size=v, valid_vocab=v, width=16)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    abstract = Rollouts(
        tokens_BL=shaped((b, p + t), jnp.int32),
        prompt_mask_BP=shaped((b, p), bool),
        mask_BT=shaped((b, t), bool),
        logp_BT=shaped((b, t), jnp.float32),
        behaviour_logp_BT=shaped((b, t), jnp.float32),
        topk_BTK=shaped((b, t, K), jnp.int32),
        topk_logp_BTK=shaped((b, t, K), jnp.float32),
        stop_BT=shaped((b, t), jnp.float32),
        finished_B=shaped((b,), bool),
    )
    compiled = score.lower(config, transformer.abstract(config), abstract, 8).compile()
    largest = max(
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", compiled.as_text())
    )
    assert b * 8 * v <= largest < b * t * v
    assert compiled.memory_analysis().temp_size_in_bytes < b * t * v * 4
