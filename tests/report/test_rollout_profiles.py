"""Profiles and shares of recorded rollouts: by hand, and intervals that cover what they should."""

import numpy as np
import pytest

from opd_jax.report import rollout_profiles as profiles

BINS = profiles.BINS


def record(sentences, **more):
    """A rollout of (tokens, M, A, standard deviation of A) for each sentence."""
    names = "tokens", "contrast", "advantage", "advantage_std"
    listed = [dict(zip(names, sentence, strict=False)) for sentence in sentences]
    return {"tokens": sum(s["tokens"] for s in listed), "sentences": listed} | more


def test_each_token_has_its_sentences_value_at_its_place_in_the_response():
    one = record([(5, 3.0, -1.0, 0.0), (5, 1.0, 0.0, 0.0)])
    two = record([(20, 7.0, -2.0, 0.0)])
    m_N, low_N, high_N = profiles.profile([one, two], profiles.margin)
    # The short one has a token in each of the ten parts, the long one two.
    expected_N = (np.repeat([3.0, 1.0], 5) + 2 * 7) / 3
    np.testing.assert_allclose(m_N, expected_N)
    assert (low_N <= m_N).all() and (m_N <= high_N).all()
    s_N = profiles.profile([one, two], profiles.score)[0]
    np.testing.assert_allclose(s_N, (np.log1p(np.repeat([3.0, 1.0], 5)) + 2 * np.log(8)) / 3)


def test_the_spread_is_that_of_the_tokens_inside_and_between_sentences():
    rng = np.random.default_rng(0)
    tokens = [rng.normal(mean, 1 + mean, 40) for mean in (0.5, 2.0, 3.0)]
    whole = [record([(40, 1.0, x.mean(), x.std())]) for x in tokens]
    found_N = profiles.profile(whole, profiles.advantage, profiles.spread)[0]
    np.testing.assert_allclose(found_N, np.std(np.concatenate(tokens)))


def test_what_is_not_finite_is_left_out_and_what_is_not_recorded_has_no_profile():
    broken = record([(5, None, -1.0), (5, 2.0, -3.0)])
    m_N = profiles.profile([broken], profiles.margin)[0]
    assert np.isnan(m_N[:5]).all() and (m_N[5:] == 2).all()
    np.testing.assert_allclose(profiles.profile([broken], profiles.advantage)[0], np.repeat([-1, -3], 5))
    assert profiles.profile([broken], profiles.advantage, profiles.spread) is None
    assert profiles.profile([], profiles.margin) is None


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(60):
        drawn = [record([(10, m, 0.0, 0.0)]) for m in rng.normal(5, 1, 40)]
        _, low_N, high_N = profiles.profile(drawn, profiles.margin)
        inside.append(low_N[0] <= 5 <= high_N[0])
    assert 0.85 <= np.mean(inside) <= 1


def test_graded_rollouts_are_split_and_others_left_out():
    rollouts = [{"right": True, "n": 0}, {"right": False, "n": 1}, {"right": None, "n": 2}, {"n": 3}]
    assert profiles.by_answer(rollouts) == {"right": rollouts[:1], "wrong": rollouts[1:2]}
    assert profiles.by_answer(rollouts[2:]) == {}


def test_releases_are_counted_over_all_and_measured_over_the_accepted_ones():
    kept = [(True, 4.0, 5), (True, 8.0, 15), (False, -3.0, 20), (False, None, 20)]
    rollouts = [
        {"accepted": accepted, "gain": gain, "kept_tokens": n, "tokens": 20} for accepted, gain, n in kept
    ]
    for estimate, value in (
        (profiles.accepted_share, 0.5),
        (profiles.gain, 6.0),
        (profiles.release_position, 0.5),
    ):
        found, low, high = estimate(rollouts)
        assert found == pytest.approx(value) and low <= value <= high
    assert profiles.gain(rollouts[2:]) is None and profiles.release_position(rollouts[2:]) is None
