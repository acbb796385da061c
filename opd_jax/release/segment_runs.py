"""Running statistics along positions, over runs of equal segment number.

Segments are never gathered into a compact array. A segment's values are at the position of its last token,
and every reduction is a scan over positions. So the static bound on the number of segments is the number of
positions, nothing is scattered, and rows are independent of each other.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from opd_jax.release.segments import scans


@flax.struct.dataclass
class Segments:
    """The runs of equal segment number along each row, over response tokens only.

    Attributes:
      mask_BT: bool, response tokens.
      start_BT: bool, first token of a segment.
      last_BT: bool, last token of a segment; one True for each segment.
      order_BT: int32, 0, 1, 2, ... by position, whatever the numbers were; -1 before the first segment.
    """

    mask_BT: jax.Array
    start_BT: jax.Array
    last_BT: jax.Array
    order_BT: jax.Array


def merge_moments(left, right):
    """(count, mean, sum of squared deviations) of two joined samples: Chan et al. (1979)."""
    n_a, mean_a, squares_a = left
    n_b, mean_b, squares_b = right
    n = n_a + n_b
    share_b = n_b / jnp.maximum(n, 1)
    delta = mean_b - mean_a
    return n, mean_a + delta * share_b, squares_a + squares_b + delta * delta * n_a * share_b


def find_segments(segment_BT: jax.Array, mask_BT: jax.Array) -> Segments:
    """Finds the segments as runs over positions.

    Args:
      segment_BT: int32 segment number, non-decreasing along the response tokens of a row.
      mask_BT: response tokens; other positions are skipped, wherever they are.
    """
    mask_BT = mask_BT.astype(bool)
    top = jnp.iinfo(jnp.int32).max
    so_far_BT = lax.cummax(jnp.where(mask_BT, segment_BT, -1), axis=1)
    still_BT = lax.cummin(jnp.where(mask_BT, segment_BT, top), axis=1, reverse=True)
    start_BT = mask_BT & (segment_BT > scans.preceding(so_far_BT, -1))
    last_BT = mask_BT & (segment_BT < scans.following(still_BT, top))
    order_BT = jnp.cumsum(start_BT.astype(jnp.int32), axis=1) - 1
    return Segments(mask_BT, start_BT, last_BT, order_BT)


def segment_mean(value_BT: jax.Array, segments: Segments) -> jax.Array:
    """Mean of value from the segment's start to each position; at `segments.last_BT`, the segment's mean.

    Sums restart at each segment instead of being differences of long prefix sums, so float32 is enough.
    """

    def add(left, right):
        return jax.tree.map(jnp.add, left, right)

    value_BT = jnp.where(segments.mask_BT, value_BT, 0).astype(jnp.float32)
    inside_BT = segments.mask_BT.astype(jnp.float32)
    count_BT, sum_BT = _segment_scan(add, (inside_BT, value_BT), segments)
    return sum_BT / jnp.maximum(count_BT, 1)


def segment_std(value_BT: jax.Array, segments: Segments) -> jax.Array:
    """Population standard deviation from the segment's start to each position; 0 for a single token."""
    value_BT = jnp.where(segments.mask_BT, value_BT, 0).astype(jnp.float32)
    inside_BT = segments.mask_BT.astype(jnp.float32)
    moments = inside_BT, value_BT, jnp.zeros_like(value_BT)
    count_BT, _, squares_BT = _segment_scan(merge_moments, moments, segments)
    return jnp.sqrt(squares_BT / jnp.maximum(count_BT, 1))


def _segment_scan(combine, values, segments: Segments):
    """Scan along positions that restarts at each segment; zeros must be neutral elements of `combine`."""

    def restart(left, right):
        joined = combine(left[1:], right[1:])
        fresh_BT = right[0]
        kept = (jnp.where(fresh_BT, new, x) for x, new in zip(joined, right[1:], strict=True))
        return left[0] | fresh_BT, *kept

    empty = (False, *(0 for _ in values))
    return scans.scan(restart, (segments.start_BT, *values), empty)[1:]
