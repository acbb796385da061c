"""Where the teacher still teaches: a rule's weights, masked, rescaled and counted.

Source: arXiv 2605.13643; docs/how_it_works.md has the formulas. The rules are in rules.py.
"""

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.errors import UserError
from opd_jax.release.change_point import ChangePoint, change_point
from opd_jax.release.rules import CERTAIN, RULES
from opd_jax.release.segment_runs import find_segments

__all__ = ["RESCALES", "ChangePoint", "Release", "certain", "change_point", "ended", "release"]

RESCALES = ("sequence", "batch", "none")


@flax.struct.dataclass
class Margins:
    """The part of `distill.Scores` that the paper's rule reads, for a trainer with scores of its own.

    Attributes:
      contrast_BT: the teacher's margin in nats: how far the best of the student's candidates is ahead of the
        second best, by the teacher's log-probabilities.
    """

    contrast_BT: jax.Array


@flax.struct.dataclass
class Release:
    """The supervision of each response token.

    weight_BT: float32, the rule's weight (q_t, for one that only chooses) times the rescale; multiplies
      the advantage. 0 outside the response.
    mask_BT: bool, supervised at all: the rule's weight is above 0, however small.
    segment_BT: int32, as given.
    kept_B: int32, supervised tokens.
    cut_B, segments_B: int32, segments with a supervised token and segments there are; for a rule that keeps
      a prefix of segments, cut_B is its release point.
    accepted_B, gain_B: see rules.Proposal.
    """

    weight_BT: jax.Array
    mask_BT: jax.Array
    segment_BT: jax.Array
    kept_B: jax.Array
    cut_B: jax.Array
    segments_B: jax.Array
    accepted_B: jax.Array
    gain_B: jax.Array


def _rescale(weight_BT: jax.Array, mask_BT: jax.Array, kind: str) -> jax.Array:
    """Scales the weights so that they sum to the response tokens of the row or of the batch.

    A row (or batch) with no weight at all stays 0. Source: arXiv 2605.13643; docs/how_it_works.md, step 5.
    """
    if kind == "none":
        return weight_BT
    axis = 1 if kind == "sequence" else None
    tokens = jnp.sum(mask_BT, axis=axis, keepdims=True, dtype=jnp.float32)
    mass = jnp.sum(weight_BT, axis=axis, keepdims=True)
    scale = jnp.where(mass > 0, tokens / jnp.where(mass > 0, mass, 1), 0)
    return weight_BT * scale


def release(scores, segment_BT: jax.Array, mask_BT: jax.Array, config, *, step=0, key=None) -> Release:
    """Decides which response tokens the teacher still supervises, and how much.

    Args:
      scores: `distill.Scores`, of which each rule reads what it needs; `Margins` has enough for the paper's.
      segment_BT: int32 sentence number, non-decreasing along the response; outside it, anything.
      mask_BT: response tokens.
      config: the `release` sub-config.
      step: number of the training step, 0 for the first, for rules that change with it.
      key: a PRNG key of the step, needed by rules that draw. They draw for the whole batch, so the result
        depends neither on the mesh nor on micro-batches.

    Raises:
      UserError: unknown `release.rule` or `release.rescale`, at trace time.
    """
    if config.rule not in RULES:
        raise UserError(f"release.rule={config.rule!r} is unknown: use one of {sorted(RULES)}")
    if config.rescale not in RESCALES:
        raise UserError(f"release.rescale={config.rescale!r} is unknown: use one of {RESCALES}")
    with jax.named_scope("release"):
        segments = find_segments(segment_BT, mask_BT)
        proposal = RULES[config.rule](scores, segments, config, step, key)
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


def ended(segment_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """[B, T]: the response tokens of all segments but the last, which may go on if more is written."""
    order_BT = find_segments(segment_BT, mask_BT).order_BT
    return mask_BT & (order_BT < order_BT.max(axis=1, keepdims=True))


def certain(
    scores, segment_BT: jax.Array, mask_BT: jax.Array, config, *, step=0
) -> tuple[jax.Array, jax.Array]:
    """Whether a rule is certain of its release while a response is still written.

    Args:
      mask_BT: the tokens so far. The rule reads what has `ended` of them.
      Others as `release`'s; the rule of the config is one of rules.CERTAIN.

    Returns:
      (certain_B; kept_B, the tokens that the rule keeps so far).
    """
    with jax.named_scope("release"):
        segments = find_segments(segment_BT, ended(segment_BT, mask_BT))
        proposal = RULES[config.rule](scores, segments, config, step, None)
        kept_BT = segments.mask_BT & (proposal.weight_BT > 0)
        return CERTAIN[config.rule](proposal, segments, config), kept_BT.sum(axis=1, dtype=jnp.int32)
