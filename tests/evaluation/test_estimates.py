"""pass@k, intervals and paired comparisons, against enumeration, SciPy and known truths."""

import itertools

import numpy as np
import pytest
from scipy import stats

from opd_jax.evaluation import estimates

CASES = [(1, 1, 1), (5, 0, 3), (5, 2, 3), (6, 5, 2), (8, 3, 4), (4, 4, 4)]


@pytest.mark.parametrize("samples, right, k", CASES)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, right, k):
    subsets = list(itertools.combinations(range(samples), k))
    share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
    assert estimates.pass_at_k(samples, right, k) == pytest.approx(share)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    right = rng.binomial(10, 0.3, 20_000)
    mean = np.mean([estimates.pass_at_k(10, int(c), 3) for c in right])
    assert mean == pytest.approx(1 - 0.7**3, abs=0.004)


def test_a_paired_p_value_is_that_of_scipys_exact_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (2, 11))
    ones = np.ones(11)
    ours = estimates.paired(a, ones, b + 0.6, ones)
    theirs = stats.permutation_test(
        (b + 0.6, a), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert ours.value == pytest.approx(theirs.statistic)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.02)


def test_no_difference_is_called_one_as_often_as_the_level_says():
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(150):
        count = rng.integers(1, 9, (2, 40)).astype(float)
        rate = rng.uniform(0, 1, 40)
        total = rng.binomial(count.astype(int), rate)
        found += estimates.paired(total[0], count[0], total[1], count[1]).p < 0.05
    assert found <= 15  # 7.5 expected


def test_pairing_finds_what_two_intervals_apart_do_not():
    rng = np.random.default_rng(3)
    hard = rng.uniform(0, 8, 100)
    a, b = hard + rng.normal(0, 0.1, 100), hard + 0.1 + rng.normal(0, 0.1, 100)
    ones = np.ones(100)
    low, _ = estimates.bootstrap_ratio(b, ones)
    _, high = estimates.bootstrap_ratio(a, ones)
    assert low < high, "the intervals overlap"
    found = estimates.paired(a, ones, b, ones)
    assert found.p < 0.001
    assert 0 < found.low < 0.1 < found.high < 0.2


@pytest.mark.parametrize("count", [2, 3, 12, 31])
def test_the_interval_over_seeds_is_students(count):
    values = np.random.default_rng(count).normal(0, 1, count)
    theirs = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose(estimates.seed_interval(values), theirs, rtol=1e-4)
