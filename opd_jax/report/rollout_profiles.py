"""Curves and shares of a run's recorded rollouts, with intervals, for right and wrong answers.

Everything is computed from the sentences in rollouts.jsonl. Imports no JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.evaluation import RESAMPLES, bootstrap_ratio

BINS = 10
GROUPS = {"right": True, "wrong": False}

Record = Mapping[str, Any]
Estimate = tuple[float, float, float]  # value, and the ends of its 95% interval


def score(sentence: Record) -> tuple[float, float]:
    """S = log(1 + mean M) of a sentence, the score of the rule.

    Source: arXiv 2605.13643; docs/how_it_works.md, step 3.
    """
    return _steady(np.log1p(_number(sentence, "contrast")))


def margin(sentence: Record) -> tuple[float, float]:
    """The teacher's mean margin M, nats."""
    return _steady(_number(sentence, "contrast"))


def advantage(sentence: Record) -> tuple[float, float]:
    """The means of the advantage A and of its square over the sentence's tokens, nats."""
    mean = _number(sentence, "advantage")
    return mean, mean**2 + _number(sentence, "advantage_std") ** 2


def mean(count, total, square):
    """The mean of a quantity, from sums."""
    return total / count


def spread(count, total, square):
    """The standard deviation of a quantity, from sums."""
    return np.sqrt(np.maximum(square / count - (total / count) ** 2, 0))


def profile(
    rollouts: Sequence[Record],
    quantity: Callable[[Record], tuple[float, float]],
    statistic: Callable = mean,
) -> np.ndarray | None:
    """A quantity over ten equal parts of each response.

    Every token has its sentence's value. Sentences whose value is not finite or not recorded are left out.

    Args:
      quantity: sentence -> (mean of the quantity, mean of its square) over the sentence's tokens.
      statistic: `mean` or `spread`.

    Returns:
      [3, BINS]: the statistic over all tokens, and the ends of its 95% bootstrap interval over rollouts. None
      if nothing is recorded.
    """
    sums_R3N = np.array([sums(rollout, quantity) for rollout in rollouts if rollout["tokens"]])
    if not sums_R3N.size:
        return None
    rows = len(sums_R3N)
    counts_DR = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    drawn_D3N = np.tensordot(counts_DR, sums_R3N, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value_N = statistic(*sums_R3N.sum(axis=0))
        draws_DN = statistic(*drawn_D3N.swapaxes(0, 1))
    known_N = np.isfinite(value_N)
    if not known_N.any():
        return None
    result_3N = np.full((3, BINS), np.nan)
    result_3N[0] = value_N
    result_3N[1:, known_N] = np.nanpercentile(draws_DN[:, known_N], [2.5, 97.5], axis=0)
    return result_3N


def by_answer(rollouts: Sequence[Record]) -> dict[str, list[Record]]:
    """The graded rollouts, right and wrong ones apart; leaves out empty groups."""
    groups = {name: [r for r in rollouts if r.get("right") is value] for name, value in GROUPS.items()}
    return {name: group for name, group in groups.items() if group}


def accepted_share(rollouts: Sequence[Record]) -> Estimate | None:
    """Share of rollouts with an accepted release."""
    return _ratio([(rollout["accepted"], 1) for rollout in rollouts])


def gain(rollouts: Sequence[Record]) -> Estimate | None:
    """Mean BIC gain of accepted releases."""
    return _ratio([(r["gain"], 1) for r in rollouts if r["accepted"] and r["gain"] is not None])


def release_position(rollouts: Sequence[Record]) -> Estimate | None:
    """Mean share of the response that stays supervised, over accepted releases."""
    return _ratio([(r["kept_tokens"] / r["tokens"], 1) for r in rollouts if r["accepted"] and r["tokens"]])


def _ratio(pairs) -> Estimate | None:
    if not pairs:
        return None
    total_N, count_N = np.array(pairs, float).T
    return float(total_N.sum() / count_N.sum()), *bootstrap_ratio(total_N, count_N)


def sums(rollout: Record, quantity) -> np.ndarray:
    """[3, BINS] for one rollout: the number of tokens, and sums of a quantity and its square over them."""
    lengths = [sentence["tokens"] for sentence in rollout["sentences"]]
    values = [quantity(sentence) for sentence in rollout["sentences"]]
    value_T2 = np.repeat(np.array(values, float).reshape(-1, 2), lengths, axis=0)
    bin_T = np.arange(len(value_T2)) * BINS // max(len(value_T2), 1)
    on_T = np.isfinite(value_T2[:, 0])
    parts = (None, value_T2[on_T, 0], value_T2[on_T, 1])
    return np.stack([np.bincount(bin_T[on_T], part, BINS) for part in parts]).astype(float)


def _steady(value: float) -> tuple[float, float]:
    return value, value**2


def _number(sentence: Record, key: str) -> float:
    value = sentence.get(key)
    return np.nan if value is None else value
