"""Finds one downward step in a row of scores, if BIC prefers it to no step.

Source: arXiv 2605.13643, the release rule; docs/how_it_works.md has the formulas.
"""

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.release.segment_runs import merge_moments
from opd_jax.release.segments import scans


@flax.struct.dataclass
class ChangePoint:
    """The best single drop in each row, and whether BIC prefers it to no drop.

    Attributes:
      accepted_B: bool, the drop is accepted.
      cut_B: int32, number of kept segments; all valid ones where nothing is accepted.
      bic0_B: float32, nats, the BIC of one mean (0 for an empty row).
      bic1_B: float32, nats, the BIC of the best drop; of a drop by 0 if no split is a drop.
      gain_B: float32, nats, bic0 - bic1, computed before either is rounded. Compare this one with 0.
    """

    accepted_B: jax.Array
    cut_B: jax.Array
    bic0_B: jax.Array
    bic1_B: jax.Array
    gain_B: jax.Array


def _moments(score_BN, valid_BN, origin_B1, *, reverse: bool = False):
    """Moments of score - origin over the valid entries from one end of the row to each position."""
    centred_BN = jnp.where(valid_BN, score_BN - origin_B1, 0)
    moments = (valid_BN.astype(jnp.float32), centred_BN, jnp.zeros_like(centred_BN))
    return scans.scan(merge_moments, moments, (0, 0, 0), reverse=reverse)


def change_point(
    score_BN: jax.Array, valid_BN: jax.Array, *, min_segments: int, eps: float = 1e-12
) -> ChangePoint:
    """Finds, in each row, the downward step that BIC prefers over no step.

    One mean has BIC0 = n log((RSS0 + eps) / n) + log n. Two means, before and after t, with the first one
    larger, have BIC1(t) = n log((RSS1(t) + eps) / n) + 3 log n. The step is accepted if min BIC1 < BIC0.

    In float32, small differences of large sums would lose their digits. So residuals are merged from
    non-negative terms: those before t relative to the row's first score, those after t relative to its last
    score. (If a split explains nearly everything, each side is close to its own end.) With
    D = n1 n2 / n (mean1 - mean2)^2, BIC0 - BIC1(t) = n log1p(D / (RSS1(t) + eps)) - 2 log n, which is precise
    even if D is tiny.

    Args:
      score_BN: segment scores in nats (log scale). Entries outside valid_BN are ignored.
      valid_BN: bool, which entries are segments: any subset of a row, in the order of positions.
      min_segments: rows with fewer valid segments accept no step (with 2 segments any drop would be
        accepted).
      eps: added to both residual sums, so that a perfect fit has a finite BIC.

    Source: arXiv 2605.13643; docs/how_it_works.md, step 4. Among equal drops the first is taken.
    """
    valid_BN = valid_BN.astype(bool)
    score_BN = jnp.where(valid_BN, score_BN, 0).astype(jnp.float32)
    first_B1 = jnp.argmax(valid_BN, axis=1, keepdims=True)
    last_B1 = valid_BN.shape[1] - 1 - jnp.argmax(valid_BN[:, ::-1], axis=1, keepdims=True)
    first_score_B1, last_score_B1 = (
        jnp.take_along_axis(score_BN, place_B1, axis=1) for place_B1 in (first_B1, last_B1)
    )
    n1_BN, mean1_BN, squares1_BN = _moments(score_BN, valid_BN, first_score_B1)
    n2_BN, mean2_BN, squares2_BN = (
        scans.following(x_BN, 0) for x_BN in _moments(score_BN, valid_BN, last_score_B1, reverse=True)
    )

    n_B, total_squares_B = n1_BN[:, -1], squares1_BN[:, -1]
    n_B1 = jnp.maximum(n_B, 1)[:, None]
    step_BN = (mean1_BN - mean2_BN) + (first_score_B1 - last_score_B1)
    between_BN = step_BN * step_BN * n1_BN * (n2_BN / n_B1)
    is_drop_BN = valid_BN & (n2_BN > 0) & (step_BN > 0)
    ratio_BN = jnp.where(is_drop_BN, between_BN / (squares1_BN + squares2_BN + eps), 0.0)

    best_B = jnp.argmax(ratio_BN, axis=1)
    best_ratio_B = jnp.max(ratio_BN, axis=1)
    log_n_B = jnp.log(jnp.maximum(n_B, 1))
    gain_B = n_B * jnp.log1p(best_ratio_B) - 2 * log_n_B
    bic0_B = n_B * (jnp.log(total_squares_B + eps) - log_n_B) + log_n_B
    # A single segment has a gain of exactly 0, and the comparison is strict.
    accepted_B = (gain_B > 0) & (n_B >= min_segments)
    cut_B = jnp.take_along_axis(n1_BN, best_B[:, None], axis=1)[:, 0]
    cut_B = jnp.where(accepted_B, cut_B, n_B).astype(jnp.int32)
    return ChangePoint(accepted_B, cut_B, bic0_B, bic0_B - gain_B, gain_B)
