"""Where the teacher still teaches: the change point of local contrast and the mask it gives.

Segments are never gathered into a compact array: what belongs to a segment sits at the position of
its last token, and every reduction is a scan over positions. So the static bound on the number of
segments is the number of positions, there is no scatter, and rows stay independent of each other.

Source: paper.md, "The release rule", steps 3 to 7.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from opd_jax.errors import UserError

RESCALES = ("sequence", "batch", "none")


@flax.struct.dataclass
class ChangePoint:
    """The best single drop of each row, and whether BIC prefers it to no drop.

    accepted_B: bool, the drop is accepted.
    cut_B: int32, number of kept segments; all valid ones where nothing is accepted.
    bic0_B: float32, nats, the fit of one mean (0 for an empty row).
    bic1_B: float32, nats, the fit of the best drop; where no split is a drop, that of a drop by
    nothing.
    gain_B: float32, nats, bic0 - bic1 before either is rounded: the one to compare with 0.
    """

    accepted_B: jax.Array
    cut_B: jax.Array
    bic0_B: jax.Array
    bic1_B: jax.Array
    gain_B: jax.Array


@flax.struct.dataclass
class Segments:
    """The runs of equal segment number along each row, over response tokens only.

    mask_BT: bool, response tokens.
    start_BT: bool, first token of a segment.
    last_BT: bool, last token of a segment; one True for each segment.
    order_BT: int32, 0, 1, 2, ... by position, whatever the numbers were; -1 before the first.
    """

    mask_BT: jax.Array
    start_BT: jax.Array
    last_BT: jax.Array
    order_BT: jax.Array


@flax.struct.dataclass
class Proposal:
    """What a rule returns: how much each position is supervised, before any rescale.

    weight_BT: float32 in [0, 1]; read only inside the response mask.
    cut_B: int32, segments kept; all of them for a rule that cuts nothing.
    accepted_B: bool, whether the rule released anything by its own test.
    gain_B: float32, nats, the evidence for the cut; 0 for a rule that has none.
    """

    weight_BT: jax.Array
    cut_B: jax.Array
    accepted_B: jax.Array
    gain_B: jax.Array


@flax.struct.dataclass
class Release:
    """The supervision of each response token.

    weight_BT: float32, q_t times the rescale; multiplies the advantage. 0 outside the response.
    mask_BT: bool, q_t: supervised at all.
    segment_BT: int32, as given.
    kept_B: int32, supervised tokens.
    cut_B, segments_B: int32, segments kept and segments there are.
    accepted_B, gain_B: see ChangePoint.
    """

    weight_BT: jax.Array
    mask_BT: jax.Array
    segment_BT: jax.Array
    kept_B: jax.Array
    cut_B: jax.Array
    segments_B: jax.Array
    accepted_B: jax.Array
    gain_B: jax.Array


# A rule: (scores, segments, config, key) -> Proposal. `config` is the `release` sub-config; `key`
# is a PRNG key for rules that draw, else None. A rule sees the whole batch, so it may move cuts
# between rollouts.
Rule = Callable[..., Proposal]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule that `release.rule = name` selects."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def _merge_moments(left, right):
    """(count, mean, sum of squared deviations) of two joined samples: Chan et al. (1979)."""
    n_a, mean_a, squares_a = left
    n_b, mean_b, squares_b = right
    n = n_a + n_b
    share_b = n_b / jnp.maximum(n, 1)
    delta = mean_b - mean_a
    return n, mean_a + delta * share_b, squares_a + squares_b + delta * delta * n_a * share_b


def _moments(score, valid, origin):
    """Moments of score - origin over the valid entries up to each position of the last axis."""
    centred = jnp.where(valid, score - origin, 0)
    moments = (valid.astype(jnp.float32), centred, jnp.zeros_like(centred))
    return lax.associative_scan(_merge_moments, moments, axis=-1)


def _shift_left(x_BT: jax.Array, fill) -> jax.Array:
    """x at the next position; `fill` at the last."""
    return jnp.concatenate([x_BT[:, 1:], jnp.full_like(x_BT[:, :1], fill)], axis=1)


def _shift_right(x_BT: jax.Array, fill) -> jax.Array:
    """x at the previous position; `fill` at the first."""
    return jnp.concatenate([jnp.full_like(x_BT[:, :1], fill), x_BT[:, :-1]], axis=1)


def change_point(
    score_BN: jax.Array, valid_BN: jax.Array, *, min_segments: int, eps: float = 1e-12
) -> ChangePoint:
    """Finds the one downward step that BIC prefers over no step, per row.

    One mean has BIC0 = n log((RSS0 + eps) / n) + log n; a mean on each side of t, the first one
    larger, has BIC1(t) = n log((RSS1(t) + eps) / n) + 3 log n; accepted if min BIC1 < BIC0.

    In float32 nothing may be a small difference of large sums. So residuals are merged from
    non-negative terms, those before t about the row's first score and those after t about its last
    (where a split explains nearly all, each side is close to its own). With
    D = n1 n2 / n (mean1 - mean2)^2, BIC0 - BIC1(t) = n log1p(D / (RSS1(t) + eps)) - 2 log n, which
    keeps its digits also where D is next to nothing.

    Args:
      score_BN: segment scores in nats (log scale). Entries outside valid_BN are ignored.
      valid_BN: bool, which entries are segments: any subset of a row, in the order of positions.
      min_segments: rows with fewer valid segments accept nothing (with 2, any drop would).
      eps: added to both residual sums, so that a perfect fit has a finite BIC.

    Source: paper.md, step 5. Among equal drops the first is taken.
    """
    valid_BN = valid_BN.astype(bool)
    score_BN = jnp.where(valid_BN, score_BN, 0).astype(jnp.float32)
    # Both directions in one scan, the second reversed, stacked on an axis that is never sharded.
    score_2BN = jnp.stack([score_BN, score_BN[:, ::-1]])
    valid_2BN = jnp.stack([valid_BN, valid_BN[:, ::-1]])
    first_2B1 = jnp.argmax(valid_2BN, axis=2, keepdims=True)
    origin_2B1 = jnp.take_along_axis(score_2BN, first_2B1, axis=2)
    moments = _moments(score_2BN, valid_2BN, origin_2B1)
    n1_BN, mean1_BN, squares1_BN = (x_2BN[0] for x_2BN in moments)
    n2_BN, mean2_BN, squares2_BN = (_shift_left(x_2BN[1, :, ::-1], 0) for x_2BN in moments)

    n_B, total_squares_B = n1_BN[:, -1], squares1_BN[:, -1]
    n_B1 = jnp.maximum(n_B, 1)[:, None]
    step_BN = (mean1_BN - mean2_BN) + (origin_2B1[0] - origin_2B1[1])
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


def find_segments(segment_BT: jax.Array, mask_BT: jax.Array) -> Segments:
    """The segments as runs over positions.

    Args:
      segment_BT: int32 segment number, non-decreasing along the response tokens of a row.
      mask_BT: response tokens; others are skipped, wherever they are.
    """
    mask_BT = mask_BT.astype(bool)
    top = jnp.iinfo(jnp.int32).max
    so_far_BT = lax.cummax(jnp.where(mask_BT, segment_BT, -1), axis=1)
    still_BT = lax.cummin(jnp.where(mask_BT, segment_BT, top), axis=1, reverse=True)
    start_BT = mask_BT & (segment_BT > _shift_right(so_far_BT, -1))
    last_BT = mask_BT & (segment_BT < _shift_left(still_BT, top))
    order_BT = jnp.cumsum(start_BT.astype(jnp.int32), axis=1) - 1
    return Segments(mask_BT, start_BT, last_BT, order_BT)


def segment_mean(value_BT: jax.Array, segments: Segments) -> jax.Array:
    """The running mean of value over the segment so far; at `segments.last_BT`, the segment's mean.

    Sums restart at each segment (no differences of long prefix sums), so float32 is enough.
    """

    def add(left, right):
        start_a, count_a, sum_a = left
        start_b, count_b, sum_b = right
        return (
            start_a | start_b,
            jnp.where(start_b, count_b, count_a + count_b),
            jnp.where(start_b, sum_b, sum_a + sum_b),
        )

    inside_BT = segments.mask_BT.astype(jnp.float32)
    value_BT = jnp.where(segments.mask_BT, value_BT, 0).astype(jnp.float32)
    _, count_BT, sum_BT = lax.associative_scan(
        add, (segments.start_BT, inside_BT, value_BT), axis=1
    )
    return sum_BT / jnp.maximum(count_BT, 1)


@rule("none")
def _keep_all(scores, segments: Segments, config, key) -> Proposal:
    """Full on-policy distillation: every response token is supervised."""
    count_B = jnp.sum(segments.last_BT, axis=1, dtype=jnp.int32)
    nothing_B = jnp.zeros(count_B.shape, jnp.float32)
    return Proposal(jnp.ones(segments.mask_BT.shape), count_B, nothing_B > 0, nothing_B)


@rule("paper")
def _local_contrast(scores, segments: Segments, config, key) -> Proposal:
    """Keeps the segments before the drop of log(1 + mean teacher margin)."""
    score_BT = jnp.log1p(segment_mean(scores.contrast_BT, segments))
    point = change_point(score_BT, segments.last_BT, min_segments=config.min_segments)
    weight_BT = (segments.order_BT < point.cut_B[:, None]).astype(jnp.float32)
    return Proposal(weight_BT, point.cut_B, point.accepted_B, point.gain_B)


def _rescale(weight_BT: jax.Array, mask_BT: jax.Array, kind: str) -> jax.Array:
    """Scales the weights so that they sum to the response tokens of the row or of the batch.

    A row (or batch) with no weight at all stays 0. Source: paper.md, step 7.
    """
    if kind == "none":
        return weight_BT
    axis = 1 if kind == "sequence" else None
    tokens = jnp.sum(mask_BT, axis=axis, keepdims=True, dtype=jnp.float32)
    mass = jnp.sum(weight_BT, axis=axis, keepdims=True)
    scale = jnp.where(mass > 0, tokens / jnp.where(mass > 0, mass, 1), 0)
    return weight_BT * scale


def release(scores, segment_BT: jax.Array, mask_BT: jax.Array, config, *, key=None) -> Release:
    """Decides which response tokens the teacher still supervises, and how much.

    Args:
      scores: Scores; rules read advantage_BT and contrast_BT, in nats.
      segment_BT: int32 sentence number, non-decreasing along the response; outside it, anything.
      mask_BT: response tokens.
      config: the `release` sub-config: rule, min_segments, rescale.
      key: a PRNG key, for rules that draw.

    Raises:
      UserError: unknown `release.rule` or `release.rescale`, at trace time.
    """
    if config.rule not in RULES:
        raise UserError(f"release.rule={config.rule!r} is unknown: use one of {sorted(RULES)}")
    if config.rescale not in RESCALES:
        raise UserError(f"release.rescale={config.rescale!r} is unknown: use one of {RESCALES}")
    with jax.named_scope("release"):
        segments = find_segments(segment_BT, mask_BT)
        proposal = RULES[config.rule](scores, segments, config, key)
        weight_BT = jnp.where(segments.mask_BT, proposal.weight_BT, 0).astype(jnp.float32)
        kept_BT = weight_BT > 0
        return Release(
            weight_BT=_rescale(weight_BT, segments.mask_BT, config.rescale),
            mask_BT=kept_BT,
            segment_BT=segment_BT,
            kept_B=jnp.sum(kept_BT, axis=1, dtype=jnp.int32),
            cut_B=proposal.cut_B,
            segments_B=jnp.sum(segments.last_BT, axis=1, dtype=jnp.int32),
            accepted_B=proposal.accepted_B,
            gain_B=proposal.gain_B,
        )
