"""Divergences against float64 NumPy sums, central differences and trl's, on odd shapes and absent ids."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from opd_jax.distill import divergences

SHAPE, VALID, ROWS, K = (2, 3), 197, 210, 7
BETAS = (0.1, 0.5, 0.9)


def reverse(s_V, t_V):
    return special.rel_entr(special.softmax(s_V, -1), special.softmax(t_V, -1)).sum(-1)


def forward(s_V, t_V):
    return reverse(t_V, s_V)


def jsd(s_V, t_V, beta):
    """The mixture weighs the teacher by beta, the ends are the KLs."""
    if beta in (0, 1):
        return reverse(s_V, t_V) if beta else forward(s_V, t_V)
    s_V, t_V = special.softmax(s_V, -1), special.softmax(t_V, -1)
    m_V = beta * t_V + (1 - beta) * s_V
    kl_teacher, kl_student = (special.rel_entr(p_V, m_V).sum(-1) for p_V in (t_V, s_V))
    return beta * kl_teacher + (1 - beta) * kl_student


def groups(x_V, top_K):
    p_V = special.softmax(x_V, -1)
    p_K = np.take_along_axis(p_V, top_K, -1)
    rest_V = p_V.copy()
    np.put_along_axis(rest_V, top_K, 0, -1)
    return np.concatenate([p_K, rest_V.sum(-1, keepdims=True)], -1)


def grouped_forward(s_V, t_V):
    top_K = top(t_V)
    return special.rel_entr(groups(t_V, top_K), groups(s_V, top_K)).sum(-1)


def top(t_V):
    return np.argsort(-t_V, axis=-1, kind="stable")[..., :K].astype(np.int32)


def ours_grouped(s_V, t_V):
    top_K = jnp.asarray(top(np.asarray(t_V)))
    return divergences.grouped_forward_kl(s_V, top_K, divergences.grouped(t_V, top_K))


CASES = {
    "reverse_kl": (divergences.reverse_kl, reverse),
    "forward_kl": (divergences.forward_kl, forward),
    "grouped_forward_kl": (ours_grouped, grouped_forward),
} | {
    f"jsd {beta}": (
        functools.partial(divergences.generalised_jsd, beta=beta),
        functools.partial(jsd, beta=beta),
    )
    for beta in (0, *BETAS, 1)
}
every = pytest.mark.parametrize("ours, reference", CASES.values(), ids=CASES)


def logits(scale=2.0, seed=0):
    """(student, teacher), float64: no absent id."""
    rng = np.random.default_rng(seed)
    s_V = scale * rng.normal(size=(*SHAPE, VALID))
    return s_V, s_V + scale * rng.normal(size=s_V.shape)


def padded(x_V, rows=ROWS):
    """float32 with absent ids at the end, as the models give them."""
    out = np.full((*x_V.shape[:-1], rows), -np.inf, np.float32)
    out[..., :VALID] = x_V
    return jnp.asarray(out)


def gradient(ours, s_V, t_V):
    return jax.grad(lambda s_V: ours(s_V, t_V).sum())(s_V)


@every
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_values_are_the_float64_sums_and_gradients_their_central_differences(ours, reference, scale):
    s_V, t_V = (x.astype(np.float32).astype(np.float64) for x in logits(scale))
    want = reference(s_V, t_V)
    got = ours(padded(s_V), padded(t_V))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    grad_V = np.asarray(gradient(ours, padded(s_V), padded(t_V)))
    assert not grad_V[..., VALID:].any()
    step = 1e-5
    for v in (0, 17, VALID - 1, int(np.argmax(s_V[0, 0])), int(np.argmax(t_V[0, 0]))):
        nudge_V = step * (np.arange(VALID) == v)
        difference = (reference(s_V + nudge_V, t_V) - reference(s_V - nudge_V, t_V)) / (2 * step)
        np.testing.assert_allclose(grad_V[..., v], difference, rtol=1e-4, atol=2e-7)


@every
def test_equal_distributions_have_no_divergence_and_exactly_no_gradient(ours, reference):
    s_V = padded(logits()[0])
    np.testing.assert_array_equal(np.abs(ours(s_V, s_V)), 0)
    np.testing.assert_allclose(gradient(ours, s_V, s_V), 0, atol=1e-9)
    # a shift of all logits changes no probability
    np.testing.assert_allclose(ours(s_V, s_V + 3), 0, atol=1e-6)


@every
def test_no_divergence_is_negative_and_gradients_of_a_row_sum_to_zero(ours, reference):
    for seed in range(5):
        s_V, t_V = (padded(x) for x in logits(0.1, seed))
        assert (np.asarray(ours(s_V, t_V)) > 0).all()
        np.testing.assert_allclose(gradient(ours, s_V, t_V).sum(-1), 0, atol=1e-6)


@every
@pytest.mark.parametrize("rows", [(ROWS, ROWS + 40), (ROWS + 40, ROWS), (VALID, ROWS)])
def test_models_may_have_different_numbers_of_absent_ids(ours, reference, rows):
    s_V, t_V = logits()
    student_V, teacher_V = padded(s_V, rows[0]), padded(t_V, rows[1])
    np.testing.assert_allclose(ours(student_V, teacher_V), reference(s_V, t_V), rtol=1e-4)
    grad_V = np.asarray(gradient(ours, student_V, teacher_V))
    assert grad_V.shape == student_V.shape
    want_V = gradient(ours, padded(s_V), padded(t_V))
    np.testing.assert_allclose(grad_V[..., :VALID], want_V[..., :VALID], atol=1e-7)


@every
def test_distributions_with_almost_no_overlap_stay_finite(ours, reference):
    s_V, t_V = np.zeros((*SHAPE, VALID)), np.zeros((*SHAPE, VALID))
    s_V[..., 3], t_V[..., 5] = 200.0, 200.0
    got = ours(padded(s_V), padded(t_V))
    assert np.isfinite(got).all() and (got > 0.1).all()
    assert np.isfinite(gradient(ours, padded(s_V), padded(t_V))).all()
    assert np.isfinite(gradient(ours, padded(t_V), padded(s_V))).all()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd 0.5"])
def test_nothing_flows_into_the_teacher(name):
    ours = CASES[name][0]
    s_V, t_V = (padded(x) for x in logits())
    grad_V = jax.grad(lambda t_V: ours(s_V, t_V).sum())(t_V)
    np.testing.assert_array_equal(grad_V, 0)


def test_jsd_at_0_is_the_forward_kl_and_at_1_the_reverse_kl():
    s_V, t_V = (padded(x) for x in logits())
    for beta, kl in ((0, divergences.forward_kl), (1, divergences.reverse_kl)):
        np.testing.assert_array_equal(divergences.generalised_jsd(s_V, t_V, beta), kl(s_V, t_V))


TRL = np.load(Path(__file__).parents[1] / "golden" / "trl_jsd.npz")


@pytest.mark.parametrize("number", range(len(TRL["beta"])), ids=[f"beta {beta}" for beta in TRL["beta"]])
def test_loss_and_gradient_are_those_of_trls_gkd_trainer(number):
    mask_BT = jnp.asarray(TRL["mask"])

    def loss(student_BTV):
        loss_BT = divergences.generalised_jsd(
            student_BTV, jnp.asarray(TRL["teacher"]), float(TRL["beta"][number])
        )
        return jnp.where(mask_BT, loss_BT, 0).sum() / mask_BT.sum()

    value, grad_BTV = jax.value_and_grad(loss)(jnp.asarray(TRL["student"]))
    np.testing.assert_allclose(value, TRL["loss"][number], rtol=1e-5)
    np.testing.assert_allclose(grad_BTV, TRL["gradient"][number], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [1e-3, 1e-4])
def test_jsd_divided_by_its_smaller_weight_tends_to_the_kl_of_that_end(beta):
    s_V, t_V = (padded(x) for x in logits(0.3))
    low = divergences.generalised_jsd(s_V, t_V, beta) / beta
    high = divergences.generalised_jsd(s_V, t_V, 1 - beta) / beta
    np.testing.assert_allclose(low, divergences.forward_kl(s_V, t_V), rtol=2 * beta, atol=1e-3)
    np.testing.assert_allclose(high, divergences.reverse_kl(s_V, t_V), rtol=2 * beta, atol=1e-3)


def test_jsd_at_a_half_is_the_symmetric_one_bounded_by_log_2():
    s_V, t_V = (padded(x) for x in logits(4.0))
    one, other = (divergences.generalised_jsd(a, b, 0.5) for a, b in ((s_V, t_V), (t_V, s_V)))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert (one < np.log(2)).all()


def test_the_grouped_kl_is_below_the_whole_one_and_tells_students_apart_by_the_rest():
    s_V, t_V = (padded(x) for x in logits())
    assert (ours_grouped(s_V, t_V) < divergences.forward_kl(s_V, t_V)).all()
    # the same proportions among the top tokens, less mass on all of them: the K terms alone miss it
    less_V = np.full(t_V.shape, 2, np.float32)
    np.put_along_axis(less_V, top(np.asarray(t_V)), 0, -1)
    assert (ours_grouped(t_V + less_V, t_V) > 0.1).all()


def test_group_probabilities_keep_their_digits_when_the_rest_is_tiny():
    x_V = np.zeros((1, VALID))
    x_V[0, :K] = 40 + np.arange(K)
    top_K = top(x_V)
    got = divergences.grouped(padded(x_V), jnp.asarray(top_K))
    np.testing.assert_allclose(got, np.log(groups(x_V, top_K)), rtol=1e-5)


ENDS = (3, 50)


def event(x_V, ids=ENDS):
    """float64 probability of `ids`."""
    return special.softmax(np.float64(x_V)[..., :VALID], -1)[..., list(ids)].sum(-1)


def event_forward(s_V, t_V):
    s, t = event(s_V), event(t_V)
    return special.rel_entr(t, s) + special.rel_entr(1 - t, 1 - s)


def ours_event(s_V, t_V, ids=ENDS):
    return divergences.event_forward_kl(s_V, ids, jnp.asarray(event(t_V, ids), jnp.float32))


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_the_event_kl_is_that_of_two_coins_and_its_gradient_their_central_difference(scale):
    s_V, t_V = (x.astype(np.float32).astype(np.float64) for x in logits(scale))
    got = ours_event(padded(s_V), padded(t_V))
    np.testing.assert_allclose(got, event_forward(s_V, t_V), rtol=2e-5, atol=2e-6)
    grad_V = np.asarray(gradient(ours_event, padded(s_V), padded(t_V)))
    assert not grad_V[..., VALID:].any()
    np.testing.assert_allclose(grad_V.sum(-1), 0, atol=1e-6)
    step = 1e-5
    for v in (*ENDS, 0, VALID - 1, int(np.argmax(s_V[0, 0]))):
        nudge_V = step * (np.arange(VALID) == v)
        up, down = (event_forward(s_V + sign * nudge_V, t_V) for sign in (1, -1))
        np.testing.assert_allclose(grad_V[..., v], (up - down) / (2 * step), rtol=1e-4, atol=2e-7)


def test_the_event_kl_of_equal_students_is_zero_and_never_above_the_whole_forward_kl():
    s_V, t_V = (padded(x) for x in logits())
    np.testing.assert_allclose(ours_event(s_V, s_V), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(ours_event, s_V, s_V), 0, atol=1e-6)
    assert (ours_event(s_V, t_V) < divergences.forward_kl(s_V, t_V)).all()


def test_the_event_kl_teaches_an_end_that_the_reverse_kl_no_longer_sees():
    """The student has unlearnt the end: the teacher's probability is 0.5, the student's 1e-12."""
    t_V, s_V = np.zeros((1, VALID)), np.zeros((1, VALID))
    t_V[..., 3], s_V[..., 3] = np.log(VALID - 1), np.log((VALID - 1) * 1e-12)
    event_pull, reverse_pull = (
        float(gradient(ours, padded(s_V), padded(t_V))[0, 3])
        for ours in (functools.partial(ours_event, ids=(3,)), divergences.reverse_kl)
    )
    np.testing.assert_allclose(event_pull, -0.5, rtol=1e-5)
    assert abs(reverse_pull) < 1e-9


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-90.0, 0.0, 80.0])
def test_a_teacher_that_is_sure_of_an_end_or_of_none_gives_a_finite_event_kl(end, logit):
    s_V = np.zeros((1, VALID))
    s_V[..., 3] = logit

    def loss(s_V):
        return divergences.event_forward_kl(s_V, (3,), jnp.array([end])).sum()

    value, grad_V = jax.value_and_grad(loss)(padded(s_V))
    odds = np.exp(logit) / (VALID - 1)
    np.testing.assert_allclose(value, np.log1p(1 / odds) if end else np.log1p(odds), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_V[0, 3], odds / (1 + odds) - end, atol=1e-6)


def test_entropy_is_that_of_scipy_without_the_absent_ids():
    s_V, _ = logits()
    want = special.entr(special.softmax(s_V, -1)).sum(-1)
    np.testing.assert_allclose(divergences.entropy(padded(s_V)), want, rtol=1e-5)


def test_a_vocabulary_of_150000_keeps_float32s_digits():
    rng = np.random.default_rng(1)
    s_V = rng.normal(size=(1, 151936)).astype(np.float32)
    t_V = s_V + np.float32(0.1) * rng.normal(size=s_V.shape).astype(np.float32)
    for name in ("reverse_kl", "forward_kl", "jsd 0.5"):
        ours, reference = CASES[name]
        np.testing.assert_allclose(ours(s_V, t_V), reference(*np.float64((s_V, t_V))), atol=3e-6)
