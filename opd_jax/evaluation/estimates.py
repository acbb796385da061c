"""Estimates and their uncertainty: pass@k, bootstrap intervals, paired comparisons."""

import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
PERMUTATIONS = 10_000
BLOCK = 1 << 22  # resampled values in memory at a time


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k responses is right.

    Source: Chen et al. 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} is not between 1 and {samples} samples")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap_ratio(total_B, count_B) -> tuple[float, float]:
    """95% percentile interval of sum(total) / sum(count) over resampled rows, with a fixed seed."""
    return bootstrap_mean([(total_B, count_B)])


def bootstrap_mean(parts) -> tuple[float, float]:
    """95% percentile interval of the mean of sum(total) / sum(count) over several sets of problems.

    Args:
      parts: (total_B, count_B) of each set; rows are resampled within their set, with a fixed seed.
    """
    drawn = []
    for seed, (total_B, count_B) in enumerate(parts):
        pick = np.random.default_rng(seed).integers(0, len(total_B), (RESAMPLES, len(total_B)))
        drawn.append(total_B[pick].sum(axis=1) / count_B[pick].sum(axis=1))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)


class Difference(NamedTuple):
    """How much larger b is than a.

    Attributes:
      value: b - a.
      low, high: ends of its 95% interval.
      p: two-sided p-value of no difference.
    """

    value: float
    low: float
    high: float
    p: float


def paired(total_a_B, count_a_B, total_b_B, count_b_B) -> Difference:
    """Compares sum(total) / sum(count) of b and a; row by row, both have the same problems.

    The interval resamples problems. The p-value is of a permutation test that swaps a and b within problems;
    it is exact if the two are exchangeable. Both use a fixed seed.
    """
    return paired_mean([(total_a_B, count_a_B)], [(total_b_B, count_b_B)])


def paired_mean(a, b) -> Difference:
    """As `paired`, for the mean of sum(total) / sum(count) over several sets of problems.

    Args:
      a, b: (total_B, count_B) of each set, the same sets in both. Problems are resampled and swapped within
        their set.
    """
    parts = [
        _draws(np.array(x, float), np.array(y, float), seed)
        for seed, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    value, resampled, swapped = (np.mean(part, axis=0) for part in zip(*parts))
    low, high = np.percentile(resampled, [2.5, 97.5])
    as_far = int((np.abs(swapped) >= abs(value) * (1 - 1e-9)).sum())
    return Difference(float(value), float(low), float(high), (as_far + 1) / (PERMUTATIONS + 1))


def _draws(a_2B, b_2B, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The difference on one set, and on its problems resampled [RESAMPLES] and swapped [PERMUTATIONS]."""
    rows = a_2B.shape[1]

    def difference(a_2N, b_2N):
        return b_2N[0] / b_2N[1] - a_2N[0] / a_2N[1]

    rng = np.random.default_rng(seed)
    pick = rng.integers(0, rows, (RESAMPLES, rows))
    resampled = difference(a_2B[:, pick].sum(axis=-1), b_2B[:, pick].sum(axis=-1))
    swaps, left = [], PERMUTATIONS
    while left:
        count = min(left, max(1, BLOCK // rows))
        swapped = rng.random((count, rows)) < 0.5
        swap = np.where(swapped, b_2B[:, None], a_2B[:, None]).sum(axis=-1)
        stay = np.where(swapped, a_2B[:, None], b_2B[:, None]).sum(axis=-1)
        swaps.append(difference(swap, stay))
        left -= count
    return difference(a_2B.sum(axis=1), b_2B.sum(axis=1)), resampled, np.concatenate(swaps)


# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
STUDENT_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def seed_interval(values) -> tuple[float, float]:
    """95% Student-t interval of the mean over two or more independent runs."""
    values = np.asarray(values, float)
    free = len(values) - 1
    quantile = STUDENT_T[free - 1] if free <= len(STUDENT_T) else 1.96
    half = quantile * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
