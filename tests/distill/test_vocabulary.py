"""The vocabulary's reductions and the exact draw against float64 SciPy and NumPy sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from opd_jax.distill import vocabulary

SIZES = pytest.mark.parametrize("v", [7, 128, 200, 1000])
LAST_UNIFORM = 1 - 2.0**-24

log_normaliser = jax.jit(lambda x_BV: vocabulary.log_normaliser(vocabulary.fold(x_BV)))
top = jax.jit(lambda x_BV, k: vocabulary.top(vocabulary.fold(x_BV), k), static_argnums=1)
draw = jax.jit(lambda x_BV, u_B2: vocabulary.draw(vocabulary.fold(x_BV), u_B2))


@jax.jit
def keep_top_k(x_BV, k):
    return unfold(vocabulary.keep_top_k(vocabulary.fold(x_BV), k), x_BV.shape[1])


@jax.jit
def keep_top_p(x_BV, p):
    return unfold(vocabulary.keep_top_p(vocabulary.fold(x_BV), p), x_BV.shape[1])


@jax.jit
def keep_min_p(x_BV, share):
    return unfold(vocabulary.keep_min_p(vocabulary.fold(x_BV), share), x_BV.shape[1])


def unfold(x_BRW, v):
    return x_BRW.reshape(x_BRW.shape[0], -1)[:, :v]


def random_logits(v, rows=6, scale=4.0, absent=0.0):
    """Distinct float32 logits; a share `absent` of each row is -inf, entry 3 never."""
    rng = np.random.default_rng(v)
    x_BV = rng.normal(scale=scale, size=(rows, v)).astype(np.float32)
    gone_BV = rng.random((rows, v)) < absent
    gone_BV[:, 3] = False
    return np.where(gone_BV, np.float32(-np.inf), x_BV)


@SIZES
def test_fold_puts_entry_v_at_row_v_over_lanes_and_fills_with_minus_infinity(v):
    x_BV = random_logits(v)
    folded_BRW = np.asarray(vocabulary.fold(jnp.asarray(x_BV)))
    assert folded_BRW.shape == (6, -(-v // vocabulary.LANES), vocabulary.LANES)
    row, lane = divmod(v - 1, vocabulary.LANES)
    np.testing.assert_array_equal(folded_BRW[:, row, lane], x_BV[:, -1])
    assert np.isneginf(folded_BRW.reshape(6, -1)[:, v:]).all()


@SIZES
@pytest.mark.parametrize("absent", [0.0, 0.5])
@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
def test_log_normaliser_equals_scipys_logsumexp_in_float64(v, absent, shift):
    x_BV = random_logits(v, absent=absent) + np.float32(shift)
    want_B = special.logsumexp(x_BV.astype(np.float64), axis=1)
    np.testing.assert_allclose(log_normaliser(x_BV), want_B, rtol=2e-7, atol=2e-6)


def test_log_normaliser_of_a_flat_150k_vocabulary_keeps_float32s_digits():
    x_BV = np.full((1, 151_936), 0.1, np.float32)
    want = np.log(151_936) + np.float64(np.float32(0.1))
    np.testing.assert_allclose(log_normaliser(x_BV), [want], rtol=2e-7)


@SIZES
@pytest.mark.parametrize("absent", [0.0, 0.3])
def test_top_gives_the_first_ids_of_a_descending_sort(v, absent):
    # absent=0.3 leaves at least 4 entries finite in each row, the smallest vocabulary included
    x_BV = random_logits(v, absent=absent if v > 7 else 0.0)
    want_BK = np.argsort(-x_BV, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(top(x_BV, 4), want_BK)


def test_top_finds_the_best_entries_when_all_stand_in_one_lane():
    x_BV = random_logits(1000, scale=0.1)
    ids = np.array([5, 5 + 128, 5 + 3 * 128, 5 + 6 * 128])
    x_BV[:, ids] = [7.0, 9.0, 8.0, 6.0]
    np.testing.assert_array_equal(top(x_BV, 4), np.tile(ids[[1, 2, 0, 3]], (6, 1)))


def test_draws_frequencies_pass_a_chi_square_test_against_softmax():
    rows, v = 20_000, 200
    logits_V = random_logits(v, rows=1, scale=1.0, absent=0.2)[0]
    u_B2 = np.random.default_rng(0).random((rows, 2), dtype=np.float32)
    ids_B = np.asarray(draw(np.broadcast_to(logits_V, (rows, v)), u_B2))
    count_V = np.bincount(ids_B, minlength=v)
    expected_V = rows * special.softmax(logits_V.astype(np.float64))
    assert count_V[expected_V == 0].sum() == 0
    rare_V = expected_V < 5
    bins = [np.append(x[~rare_V], x[rare_V].sum()) for x in (count_V, expected_V)]
    assert stats.chisquare(*bins).pvalue > 1e-3


@pytest.mark.parametrize("v", [7, 200, 1000])
def test_draw_never_takes_an_entry_without_mass_at_the_extreme_uniforms(v):
    extremes = np.array([(a, b) for a in (0, LAST_UNIFORM) for b in (0, LAST_UNIFORM)], np.float32)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x_BV = rng.normal(scale=3, size=(4, v)).astype(np.float32)
        present_BV = np.zeros((4, v), bool)
        present_BV[:, rng.choice(v, size=1 + seed % 3, replace=False)] = True
        ids_B = np.asarray(draw(np.where(present_BV, x_BV, -np.inf).astype(np.float32), extremes))
        assert present_BV[np.arange(4), ids_B].all()


def test_draw_reaches_the_first_and_the_last_lane_and_entry():
    x_BV = np.zeros((2, 256), np.float32)
    u_B2 = np.array([(0, 0), (LAST_UNIFORM, LAST_UNIFORM)], np.float32)
    np.testing.assert_array_equal(draw(x_BV, u_B2), [0, 255])


def test_pick_logit_reads_the_logits_of_the_given_ids():
    x_BV = random_logits(200)
    ids_BN = np.random.default_rng(1).integers(0, 200, (6, 3))
    got_BN = vocabulary.pick_logit(vocabulary.fold(jnp.asarray(x_BV)), jnp.asarray(ids_BN))
    np.testing.assert_array_equal(got_BN, np.take_along_axis(x_BV, ids_BN, axis=1))


@SIZES
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_keep_top_k_keeps_what_a_sort_keeps(v, k, shift):
    x_BV = random_logits(v) + np.float32(shift)
    threshold_B1 = -np.sort(-x_BV, axis=1)[:, k - 1 : k]
    np.testing.assert_array_equal(keep_top_k(x_BV, k), np.where(x_BV >= threshold_B1, x_BV, -np.inf))


def test_keep_top_k_keeps_every_entry_tied_with_the_kth():
    x_BV = np.array([[3, -1, 2, 2, 2, -5]], np.float32)
    want_BV = [[3, -np.inf, 2, 2, 2, -np.inf]]
    np.testing.assert_array_equal(keep_top_k(x_BV, 2), want_BV)


def test_keep_top_k_of_more_than_the_finite_entries_changes_nothing():
    x_BV = np.array([[1, -np.inf, -2, 0, -np.inf]], np.float32)
    np.testing.assert_array_equal(keep_top_k(x_BV, 4), x_BV)


@SIZES
@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_keep_top_p_keeps_the_smallest_leading_set_of_a_sort_that_reaches_p(v, p, shift):
    x_BV = random_logits(v, absent=0.2) + np.float32(shift)
    kept_BV = np.isfinite(np.asarray(keep_top_p(x_BV, p)))
    mass_BV = special.softmax(x_BV.astype(np.float64), axis=1)
    order_BV = np.argsort(-mass_BV, axis=1, kind="stable")
    before_BV = np.cumsum(np.take_along_axis(mass_BV, order_BV, axis=1), axis=1)
    before_BV = np.pad(before_BV, ((0, 0), (1, 0)))[:, :-1]
    # no row's sum comes so near p that float32 could decide otherwise
    assert np.abs(before_BV - p).min() > 1e-7
    want_BV = np.zeros_like(kept_BV)
    np.put_along_axis(want_BV, order_BV, before_BV < p, axis=1)
    np.testing.assert_array_equal(kept_BV, want_BV)
    np.testing.assert_array_equal(np.asarray(keep_top_p(x_BV, p))[kept_BV], x_BV[kept_BV])


def test_keep_top_p_keeps_all_of_a_flat_row_because_its_entries_tie():
    x_BV = np.full((1, 200), -2.5, np.float32)
    np.testing.assert_array_equal(keep_top_p(x_BV, 0.1), x_BV)


def test_keep_top_p_just_below_one_drops_no_entry_that_float32_can_see():
    x_BV = np.log(np.array([[0.5, 0.3, 0.1999, 0.0001]], np.float32))
    np.testing.assert_array_equal(keep_top_p(x_BV, LAST_UNIFORM), x_BV)


@SIZES
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.9])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_keep_min_p_keeps_what_is_that_share_as_likely_as_the_likeliest(v, share, shift):
    x_BV = random_logits(v, absent=0.2) + np.float32(shift)
    mass_BV = special.softmax(x_BV.astype(np.float64), axis=1)
    ratio_BV = mass_BV / mass_BV.max(axis=1, keepdims=True)
    # no entry comes so near the share that float32 could decide otherwise
    assert np.abs(ratio_BV / share - 1).min() > 1e-5
    np.testing.assert_array_equal(keep_min_p(x_BV, share), np.where(ratio_BV >= share, x_BV, -np.inf))


def test_keep_min_p_of_one_keeps_the_likeliest_and_its_ties_alone():
    x_BV = np.array([[1, 3, -2, 3, 0]], np.float32)
    np.testing.assert_array_equal(keep_min_p(x_BV, 1.0), [[-np.inf, 3, -np.inf, 3, -np.inf]])
