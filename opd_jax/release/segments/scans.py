"""Prefix scans along the positions of a batch, [B, T].

A scan is one loop of log2(T) rounds. In each round every position joins what ends 1, 2, 4, ... positions
before it. The loop's body is compiled once for any T. `lax.associative_scan` would compile every round twice,
each at a size of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax


def scan(join, parts, empty, *, reverse: bool = False):
    """Joins the parts of all positions up to each one.

    Args:
      join: (left, right) -> joined, associative and elementwise; each is a tuple of [B, T] arrays.
      parts: tuple of [B, T] arrays, the contribution of each position.
      empty: tuple of scalars, the neutral element of `join` on either side.
      reverse: join from each position to the end; `left` is still the earlier part.

    Returns:
      A tuple like parts.
    """
    end = parts[0].shape[1]
    fills = [jnp.full_like(x_BT, fill) for x_BT, fill in zip(parts, empty, strict=True)]

    def double(i, joined):
        away = 1 << i
        start = away if reverse else end - away
        others = tuple(
            lax.dynamic_slice_in_dim(
                jnp.concatenate([x_BT, fill_BT] if reverse else [fill_BT, x_BT], axis=1), start, end, axis=1
            )
            for x_BT, fill_BT in zip(joined, fills, strict=True)
        )
        return join(joined, others) if reverse else join(others, joined)

    return lax.fori_loop(0, (end - 1).bit_length(), double, tuple(parts))


def maximum(x_BT):
    """int32, the maximum up to each position; x_BT is -1 or more."""
    return scan(_maximum, (x_BT,), (-1,))[0]


def last_until(event_BT):
    """int32 position of the last event at or before each position; -1 if there is none."""
    return maximum(jnp.where(event_BT, lax.broadcasted_iota(jnp.int32, event_BT.shape, 1), -1))


def first_from(event_BT):
    """int32 position of the first event at or after each position; T if there is none."""
    end = event_BT.shape[1]
    position_BT = jnp.where(event_BT, lax.broadcasted_iota(jnp.int32, event_BT.shape, 1), end)
    return scan(_minimum, (position_BT,), (end,), reverse=True)[0]


def count(event_BT):
    """int32 number of events up to and including each position."""
    return scan(_add, (event_BT.astype(jnp.int32),), (0,))[0]


def following(x_BT, fill):
    """x at the next position; `fill` at the last."""
    return jnp.concatenate([x_BT[:, 1:], jnp.full_like(x_BT[:, :1], fill)], axis=1)


def preceding(x_BT, fill):
    """x at the previous position; `fill` at the first."""
    return jnp.concatenate([jnp.full_like(x_BT[:, :1], fill), x_BT[:, :-1]], axis=1)


def _maximum(left: tuple[jax.Array], right: tuple[jax.Array]):
    return (jnp.maximum(left[0], right[0]),)


def _minimum(left: tuple[jax.Array], right: tuple[jax.Array]):
    return (jnp.minimum(left[0], right[0]),)


def _add(left: tuple[jax.Array], right: tuple[jax.Array]):
    return (left[0] + right[0],)
