"""Responses that end in a loop, against a plain search over periods."""

import jax
import numpy as np
import pytest

from opd_jax.distill.repeats import repeated_tail

T = 24


def plain(tokens, tail, period):
    """The definition, word for word; `tokens` without the end token."""
    return any(
        len(tokens) >= tail + p and all(tokens[-1 - i] == tokens[-1 - i - p] for i in range(tail))
        for p in range(1, period + 1)
    )


def rows(responses, ends):
    """(tokens_BT, mask_BT, finished_B) of lists of ids; one that ended has 9 as its end token."""
    tokens_BT, mask_BT = np.full((len(responses), T), 7, np.int32), np.zeros((len(responses), T), bool)
    for b, (response, end) in enumerate(zip(responses, ends, strict=True)):
        whole = [*response, *[9] * end]
        tokens_BT[b, : len(whole)], mask_BT[b, : len(whole)] = whole, True
    return tokens_BT, mask_BT, np.array(ends)


compiled = jax.jit(repeated_tail, static_argnames=("tail", "period"))


@pytest.mark.parametrize("tail, period", [(1, 1), (3, 2), (4, 4), (6, 3), (12, 12), (20, 8)])
def test_loops_are_those_of_a_plain_search_over_periods(tail, period):
    rng = np.random.default_rng(tail)
    responses = [rng.integers(0, 3, rng.integers(0, T)).tolist() for _ in range(200)]
    responses += [
        (rng.integers(0, 5, n).tolist() + 9 * rng.integers(0, 5, p).tolist())[: T - 1]
        for n in range(6)
        for p in range(1, 7)
    ]
    ends = rng.integers(0, 2, len(responses)).astype(bool).tolist()
    want = [plain(response, tail, period) for response in responses]
    assert len(set(want)) == 2 or tail == 20, "the responses no longer show both"
    np.testing.assert_array_equal(compiled(*rows(responses, ends), tail=tail, period=period), want)


def test_padding_after_a_short_response_is_no_loop():
    assert not compiled(*rows([[1, 2, 3], [], [1] * 5], [True, False, False]), tail=5, period=4).any()


def test_an_end_token_after_a_loop_does_not_hide_it():
    assert compiled(*rows([[1, 2] * 6], [True]), tail=8, period=2).all()


def test_a_loop_longer_than_the_longest_period_is_none():
    response = [[1, 2, 3, 4, 5] * 4]
    assert compiled(*rows(response, [False]), tail=8, period=5).all()
    assert not compiled(*rows(response, [False]), tail=8, period=4).any()
