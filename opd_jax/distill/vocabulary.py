"""One token out of a vocabulary: log-sum-exp, the top candidates and an exact draw, in one pass.

The vocabulary is folded to [B, R, W]: W lanes of R entries. Every reduction runs over R and keeps the
lanes, which vectorises on a CPU and needs no cross-lane step on a TPU; what is left is W numbers a row.
A full sort, a Gumbel value an entry, or a cumulative sum over V would each cost more than the model's
own last layer.
"""

import jax
import jax.numpy as jnp

LANES = 128


def fold(logits_BV):
    """[B, R, W] view of [B, V]; entry v stands at (v // W, v % W), the tail is -inf."""
    b, v = logits_BV.shape
    padded = jnp.pad(logits_BV, ((0, 0), (0, -v % LANES)), constant_values=-jnp.inf)
    return padded.reshape(b, -1, LANES)


def log_normaliser(logits_BRW):
    """log-sum-exp over each row, [B], float32; a sum of lane sums, so 150k entries keep float32's digits."""
    peak_B = logits_BRW.max(axis=(1, 2))
    lane_BW = jnp.exp(logits_BRW - peak_B[:, None, None]).sum(axis=1)
    return peak_B + jnp.log(lane_BW.sum(axis=1))


def _first_max(x_BN, count: int):
    """Indices of the `count` largest of a short row, [B, count], largest first; equal values by index."""
    picks = []
    column = jnp.arange(x_BN.shape[1])[None]
    for _ in range(count):
        # Two plain reductions, which vectorise; an argmax, which carries an index along, does not.
        at_peak_BN = x_BN == x_BN.max(axis=1, keepdims=True)
        pick_B1 = jnp.where(at_peak_BN, column, x_BN.shape[1] - 1).min(axis=1, keepdims=True)
        picks.append(pick_B1)
        x_BN = jnp.where(column == pick_B1, -jnp.inf, x_BN)
    return jnp.concatenate(picks, axis=1)


def top(logits_BRW, count: int):
    """Ids of the `count` most likely entries, [B, count] int32, most likely first.

    An entry of the top `count` can only stand in one of the `count` lanes with the largest maxima, so
    two short selections replace one over the whole vocabulary.
    """
    lane_BK = jnp.sort(_first_max(logits_BRW.max(axis=1), count), axis=1)
    column_BRK = jnp.take_along_axis(logits_BRW, lane_BK[:, None], axis=2)
    pick_BK = _first_max(column_BRK.reshape(column_BRK.shape[0], -1), count)
    row_BK, which_BK = pick_BK // count, pick_BK % count
    return (row_BK * LANES + jnp.take_along_axis(lane_BK, which_BK, axis=1)).astype(jnp.int32)


def _inverse_cdf(mass_BN, u_B):
    """First index at which the running sum passes u times the total; never an entry of zero mass."""
    running_BN = jnp.cumsum(mass_BN, axis=1)
    passed_BN = (running_BN > u_B[:, None] * running_BN[:, -1:]) & (mass_BN > 0)
    last_B = mass_BN.shape[1] - 1 - jnp.argmax(mass_BN[:, ::-1] > 0, axis=1)
    return jnp.where(passed_BN.any(axis=1), jnp.argmax(passed_BN, axis=1), last_B)


def draw(logits_BRW, u_B2):
    """One id a row, distributed as softmax(logits), from two uniforms in [0, 1) a row.

    The first uniform picks a lane by its mass, the second an entry within it: each has float32's 2^-24
    steps to itself, so an entry's probability is resolved to about 2^-24 of its lane's, not of the whole.
    """
    mass_BRW = jnp.exp(logits_BRW - logits_BRW.max(axis=(1, 2), keepdims=True))
    lane_B = _inverse_cdf(mass_BRW.sum(axis=1), u_B2[:, 0])
    column_BR = jnp.take_along_axis(mass_BRW, lane_B[:, None, None], axis=2)[:, :, 0]
    return (_inverse_cdf(column_BR, u_B2[:, 1]) * LANES + lane_B).astype(jnp.int32)


def pick_logit(logits_BRW, id_BN):
    """The logits of chosen ids: [B, N] from [B, R, W]."""
    flat_BV = logits_BRW.reshape(logits_BRW.shape[0], -1)
    return jnp.take_along_axis(flat_BV, id_BN, axis=1)


def keep_top_k(logits_BRW, k: int):
    """-inf outside the k most likely entries (entries tied with the k-th stay)."""
    return _keep_above(logits_BRW, lambda kept_BRW: kept_BRW.sum(axis=(1, 2)) >= k)


def keep_top_p(logits_BRW, p: float):
    """-inf outside the smallest set of most likely entries whose probability reaches p (ties stay)."""
    mass_BRW = jnp.exp(logits_BRW - logits_BRW.max(axis=(1, 2), keepdims=True))
    goal_B = p * mass_BRW.sum(axis=1).sum(axis=1)
    return _keep_above(
        logits_BRW,
        lambda kept_BRW: jnp.where(kept_BRW, mass_BRW, 0).sum(axis=1).sum(axis=1) >= goal_B,
    )


def keep_min_p(logits_BRW, share: float):
    """-inf at entries less likely than `share`, above 0, times the row's most likely one."""
    floor_B = logits_BRW.max(axis=(1, 2)) + jnp.log(jnp.float32(share))
    return jnp.where(logits_BRW >= floor_B[:, None, None], logits_BRW, -jnp.inf)


def _keep_above(logits_BRW, enough):
    """Keeps entries at or above the highest threshold for which `enough(kept_BRW)` holds.

    The threshold is found bit by bit in the order-preserving integer form of float32: 32 passes, exact,
    and no sort of the vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(logits_BRW, jnp.int32)
    order_BRW = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def halve(_, bounds):
        low_B, high_B = bounds  # enough(low) holds, enough(high + 1) does not
        middle_B = (low_B >> 1) + (high_B >> 1) + ((low_B | high_B) & 1)  # rounded up, no overflow
        ok_B = enough(order_BRW >= middle_B[:, None, None])
        return jnp.where(ok_B, middle_B, low_B), jnp.where(ok_B, high_B, middle_B - 1)

    bounds = order_BRW.min(axis=(1, 2)), order_BRW.max(axis=(1, 2))
    threshold_B, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order_BRW >= threshold_B[:, None, None], logits_BRW, -jnp.inf)
