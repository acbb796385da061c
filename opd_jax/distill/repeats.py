"""Responses that end in a loop: the same few tokens over and over."""

import jax.numpy as jnp

TAIL = 32  # tokens at the end of a response that are looked at
PERIOD = 32  # tokens of the longest loop that is found


def repeated_tail(tokens_BT, mask_BT, finished_B, *, tail: int = TAIL, period: int = PERIOD):
    """Whether the last `tail` tokens of each response equal those p tokens before, for one p up to `period`.

    The end token is left out. A response with fewer than tail + p tokens does not repeat with period p, so
    every loop that is found went round more than once. One gather of tail + period tokens a row, then
    comparisons: nothing is sorted or scattered.

    Args:
      tokens_BT: ids of the responses.
      mask_BT: response tokens, the end token included; a prefix of each row.
      finished_B: ended by an end token.

    Returns:
      [B] bool.

    Source: ShortOPD (arXiv 2607.13124) names the symptom; the test is ours.
    """
    length_B = mask_BT.sum(axis=1) - finished_B
    place_BN = length_B[:, None] - (tail + period) + jnp.arange(tail + period)[None]
    token_BN = jnp.take_along_axis(tokens_BT, jnp.maximum(place_BN, 0), axis=1)
    last_BW = token_BN[:, period:]
    repeats_B = jnp.zeros(length_B.shape, bool)
    for p in range(1, period + 1):
        same_B = (last_BW == token_BN[:, period - p : period - p + tail]).all(axis=1)
        repeats_B |= same_B & (length_B >= tail + p)
    return repeats_B
