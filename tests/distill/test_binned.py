"""The sums by bin behind the training step's histograms, alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import train_step

BINS = train_step.POSITION_BINS

binned = jax.jit(train_step.binned)


@pytest.mark.parametrize("shape", [(50,), (6, 40)])
def test_each_bin_has_the_sum_of_its_entries_in_float32(shape):
    rng = np.random.default_rng(0)
    bin_, x = rng.integers(0, BINS, shape), rng.normal(size=shape).astype(np.float32)
    got = binned(bin_, x)
    assert got.shape == (BINS,) and got.dtype == jnp.float32
    want = np.bincount(bin_.reshape(-1), x.reshape(-1).astype(np.float64), BINS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert binned(bin_, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_entries_of_a_bin_out_of_range_are_in_no_sum_even_where_they_are_no_number():
    bin_BT = np.array([[0, 0, BINS, BINS], [BINS - 1, -1, BINS + 7, 3]])
    x_BT = np.array([[1.0, 2.0, np.nan, np.inf], [4.0, np.nan, 8.0, 16.0]], np.float32)
    want = np.zeros(BINS)
    want[[0, BINS - 1, 3]] = 3.0, 4.0, 16.0
    np.testing.assert_array_equal(binned(bin_BT, x_BT), want)


def test_what_is_no_number_stays_in_the_sum_of_its_own_bin_alone():
    got = binned(np.array([2, 2, 5]), np.array([1.0, np.nan, 3.0], np.float32))
    assert np.isnan(got[2]) and got[5] == 3.0 and np.count_nonzero(np.isnan(got)) == 1
