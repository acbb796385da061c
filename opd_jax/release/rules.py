"""Which positions the teacher supervises, and how much: the paper's rule and its rivals, by name.

A rule is one function registered with `@rule(name)`; `release.rule = name` selects it. Fields of the config
that it alone reads are declared there too. It proposes non-negative weights; release.py masks, rescales and
counts them. docs/rules.md says which part of each is its source's and which is our reading.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.declare import Field, parameters
from opd_jax.release.change_point import ChangePoint, change_point
from opd_jax.release.segment_runs import Segments, segment_mean, segment_std
from opd_jax.release.segments import scans

# Quantiles between which TA-OPD's two factors are stretched to [0, 1].
LOW_QUANTILE, HIGH_QUANTILE = 0.05, 0.95


@flax.struct.dataclass
class Proposal:
    """What a rule returns: how much each position is supervised, before any rescale.

    weight_BT: float32, at least 0; read only inside the response. Above 0 is supervised.
    cut_B: int32, segments with a supervised token.
    accepted_B: bool, the rule released something: by its own test where it has one, else where some
      response token is not supervised.
    gain_B: float32, nats, the evidence for the cut; 0 for a rule that has none.
    """

    weight_BT: jax.Array
    cut_B: jax.Array
    accepted_B: jax.Array
    gain_B: jax.Array


# A rule: (scores, segments, config, step, key) -> Proposal. `config` is the `release` sub-config; `step`
# is the int32 number of the training step, 0 for the first; `key` is a PRNG key of that step, for rules
# that draw. A rule sees the whole batch, so it may move cuts between rollouts.
Rule = Callable[..., Proposal]
RULES: dict[str, Rule] = {}

# Whether each row's release is certain while the response is still written, from what the rule says of its
# sentences so far: (proposal, segments, config) -> certain_B. The tokens before the release stay the rule's.
Certain = Callable[[Proposal, Segments, Any], jax.Array]
CERTAIN: dict[str, Certain] = {}  # by the rules' names; others cannot end a response


def by_gain(proposal: Proposal, segments: Segments, config) -> jax.Array:
    """For a change point: BIC prefers it by `stop_gain` nats, and `stop_after` sentences follow it."""
    after_B = _count(segments.last_BT) - proposal.cut_B
    return proposal.accepted_B & (proposal.gain_B > config.stop_gain) & (after_B >= config.stop_after)


def at_once(proposal: Proposal, segments: Segments, config) -> jax.Array:
    """For a rule that keeps a prefix and decides on it by what is written: what follows changes nothing."""
    return proposal.accepted_B


def rule(name: str, certain: Certain | None = None, **fields: Field) -> Callable[[Rule], Rule]:
    """Registers a function as the rule that `release.rule = name` selects.

    Args:
      certain: says while a response is written whether its release is certain, for `release.stop=rule`; such
        as `by_gain` or `at_once`. None: the rule needs whole responses.
      fields: fields of the config that this rule alone reads, as `release.FIELD` and `config.FIELD`.

    Raises:
      ValueError: another rule has such a field, or the name is that of a rule of this package.
    """

    def register(function: Rule) -> Rule:
        known = RULES.get(name)
        if known and known.__module__ == __name__ != function.__module__:
            raise ValueError(f"release.rule={name} is a rule of opd_jax; choose another name")
        parameters("release", name, fields)
        RULES[name] = function
        CERTAIN.pop(name, None)
        if certain is not None:
            CERTAIN[name] = certain
        return function

    return register


@rule("none")
def _keep_all(scores, segments: Segments, config, step, key) -> Proposal:
    """Full on-policy distillation: every response token is supervised."""
    return propose(jnp.ones(segments.mask_BT.shape), segments)


@rule("paper", certain=by_gain)
def _local_contrast(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the segments before the drop of log(1 + mean teacher margin).

    Source: arXiv 2605.13643; docs/how_it_works.md, steps 3 and 4.
    """
    return _up_to(_margin_drop(scores, segments, config), segments)


@rule("advantage_std", certain=by_gain)
def _advantage_std(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the segments before the drop of log(1 + std of the advantage), with the paper's test.

    Source: an ablation of arXiv 2605.13643. Ours: the logarithm of the score stays, and the standard
    deviation is the population's, so a segment of one token has 0.
    """
    score_BT = jnp.log1p(segment_std(scores.advantage_BT, segments))
    point = change_point(score_BT, segments.last_BT, min_segments=config.min_segments)
    return _up_to(point, segments)


@rule("suffix")
def _suffix(scores, segments: Segments, config, step, key) -> Proposal:
    """Supervises exactly what the paper's rule releases; a rollout without a release has weight 0.

    Source: arXiv 2605.13643, the negative control of its ablations.
    """
    point = _margin_drop(scores, segments, config)
    return Proposal(
        weight_BT=(segments.order_BT >= point.cut_B[:, None]).astype(jnp.float32),
        cut_B=_count(segments.last_BT) - point.cut_B,
        accepted_B=point.accepted_B,
        gain_B=point.gain_B,
    )


@rule(
    "prefix",
    prefix_tokens=Field(
        0,
        "Tokens kept of each response. 0 means: keep the share `release.prefix_fraction` instead.",
        least=0,
    ),
    prefix_fraction=Field(
        0.3,
        "Share of each response that is kept, above 0 and at most 1. Used if `release.prefix_tokens` is 0.",
        least=1e-6,
        most=1,
    ),
)
def _fixed_prefix(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the first `prefix_tokens` tokens or, where that is 0, the share `prefix_fraction` of a response.

    Source: an ablation of arXiv 2605.13643. Ours: a share is rounded, and at least one token stays.
    """
    if config.prefix_tokens:
        return _first_tokens(jnp.int32(config.prefix_tokens), segments)
    return _first_tokens(_tokens_of_share(config.prefix_fraction, segments), segments)


@rule(
    "esr",
    certain=at_once,
    esr_tokens=Field(100, "Tokens kept of each response.", least=1),
)
def _early_stop(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the first `esr_tokens` tokens of each response.

    Source: ESR, arXiv 2605.27028: a fixed horizon of the first 100 tokens (of which only a summary was at
    hand). With `release.stop=length:100` sampling ends there too, as theirs does.
    """
    return _first_tokens(jnp.int32(config.esr_tokens), segments)


@rule(
    "popd",
    certain=at_once,
    popd_start=Field(
        0.1, "Share of `rollout.max_tokens` kept of each response at the first step.", least=1e-6, most=1
    ),
    popd_steps=Field(100, "Steps over which the kept length grows linearly to all of it.", least=1),
)
def _growing_horizon(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the tokens before a horizon, which grows linearly from a share of the length limit to all of it.

    Source: TOPD and POPD, arXiv 2605.31490: a horizon of 10% of the length does as well as all of it, and one
    that grows does better (of which only a summary was at hand). Ours: that it grows linearly, and from when.
    """
    done = jnp.minimum(step / max(config.popd_steps - 1, 1), 1.0)
    share = config.popd_start + (1 - config.popd_start) * done
    tokens = jnp.round(share * segments.mask_BT.shape[1])
    return _first_tokens(jnp.maximum(tokens, 1).astype(jnp.int32), segments)


@rule(
    "kat",
    certain=at_once,
    kat_kl=Field(0.05, "Nats a token: a sentence below it has nothing left to learn.", least=0),
    kat_sentences=Field(3, "Sentences in a row that must be below it.", least=1),
)
def _nothing_left(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps the segments before the first run of `kat_sentences` in which the two models already agree.

    A token's divergence is KL(student || teacher) over the student's K candidates and all other tokens as
    one more; a segment's is the mean of its tokens.

    Source: KAT, arXiv 2606.09471: a rollout stops where the KL is persistently low (of which only a summary
    was at hand). Ours: segments, the mean, the threshold and the number of segments.
    """
    kl_BT = segment_mean(_candidate_kl(scores), segments)
    low_BT = segments.last_BT & (kl_BT < config.kat_kl)
    # Low segments in a row up to each: the segments since the last one that is not low.
    number_BT = segments.order_BT + 1
    high_BT = jnp.where(segments.last_BT & ~low_BT, number_BT, 0)
    run_BT = jnp.where(segments.last_BT, number_BT - jax.lax.cummax(high_BT, axis=1), 0)
    found_BT = run_BT >= config.kat_sentences
    first_B = jnp.where(found_BT, number_BT, jnp.iinfo(jnp.int32).max).min(axis=1)
    cut_B = jnp.where(found_BT.any(axis=1), first_B - config.kat_sentences, _count(segments.last_BT))
    return propose(segments.order_BT < cut_B[:, None], segments)


@rule(
    "fopd",
    certain=at_once,
    fopd_start=Field(128, "Tokens kept of each response at the first step.", least=1),
    fopd_end=Field(1024, "Tokens kept from step number `release.fopd_steps` on.", least=1),
    fopd_steps=Field(100, "Steps over which the kept length grows linearly.", least=1),
)
def _growing_prefix(scores, segments: Segments, config, step, key) -> Proposal:
    """Keeps a prefix whose length in tokens grows linearly from `fopd_start` to `fopd_end`.

    The first step has fopd_start, step number `fopd_steps` and all later ones fopd_end.

    Source: FOPD, "Fast and Effective On-policy Distillation from Reasoning Prefixes", arXiv 2602.15260:
    supervision of a prefix whose length follows a linear schedule (of which only summaries were at
    hand). Ours: the two lengths and the steps. There sampling stops at the prefix, as with
    `release.stop=grow:A:B:STEPS`.
    """
    done = jnp.minimum(step / max(config.fopd_steps - 1, 1), 1.0)
    tokens = config.fopd_start + (config.fopd_end - config.fopd_start) * done
    return _first_tokens(jnp.round(tokens).astype(jnp.int32), segments)


@rule("shuffled")
def _shuffled(scores, segments: Segments, config, step, key) -> Proposal:
    """The paper's release points, as shares of the response, permuted between the rollouts of the batch.

    Source: an ablation of arXiv 2605.13643. Ours: a point lands on a token rather than on the end
    of a segment, at least one token stays, and 1 (nothing released) is a point like others.
    """
    length_B, kept_B = _count(segments.mask_BT), _margin_kept(scores, segments, config)
    share_B = jnp.where(length_B > 0, kept_B / jnp.maximum(length_B, 1), 1.0)
    share_B = jax.random.permutation(key, share_B)
    return _first_tokens(_tokens_of_share(share_B, segments), segments)


@rule("random")
def _random_cut(scores, segments: Segments, config, step, key) -> Proposal:
    """Cuts each rollout at random, so that the batch keeps as many tokens as by the paper's rule, expected.

    Each rollout keeps its first token and, of the others, a share drawn uniformly from the widest interval
    in [0, 1] whose mean is m, where m is the share of such tokens that the paper's rule keeps in the whole
    batch. Lengths are rounded at random, so that the expectation is exact.

    Source: an ablation of arXiv 2605.13643; the distribution is ours.
    """
    length_B, kept_B = _count(segments.mask_BT), _margin_kept(scores, segments, config)
    others_B = jnp.maximum(length_B - 1, 0)
    mean = jnp.maximum(kept_B - 1, 0).sum() / jnp.maximum(others_B.sum(), 1)
    low, high = jnp.maximum(2 * mean - 1, 0), jnp.minimum(2 * mean, 1)
    point_B, rounding_B = jax.random.uniform(key, (2, *length_B.shape))
    share_B = low + (high - low) * point_B
    kept_B = 1 + jnp.floor(share_B * others_B + rounding_B).astype(jnp.int32)
    return _first_tokens(kept_B, segments)


@rule(
    "iw_opd",
    iw_gamma=Field(
        0.5, "The first token weighs 1 + gamma; weights fall to about 1 along the response.", least=0
    ),
)
def _importance(scores, segments: Segments, config, step, key) -> Proposal:
    """Weighs tokens by how little the student had drifted: w_t = 1 + gamma (1 - sum_{k<t}|A_k| / sum_k|A_k|).

    Weights fall from 1 + gamma to about 1 along the response, and every token is supervised.

    Source: IW-OPD, "On the Position Bias of On-Policy Distillation", arXiv 2606.22600.
    """
    size_BT = jnp.where(segments.mask_BT, jnp.abs(scores.advantage_BT), 0)
    # 1 - sum_{k<t} / sum is sum_{k>=t} / sum: no difference of sums, so exactly 1 at the first token.
    left_BT = jnp.cumsum(size_BT[:, ::-1], axis=1)[:, ::-1]
    total_B1 = left_BT[:, :1]
    left_share_BT = jnp.where(total_B1 > 0, left_BT / jnp.where(total_B1 > 0, total_B1, 1), 1.0)
    return propose(1 + config.iw_gamma * left_share_BT, segments)


@rule(
    "prune_opd",
    certain=at_once,
    prune_overlap=Field(
        0.7,
        """A token has drifted if the two models share less than this share of their `scoring.candidates` most
        likely tokens. The authors' runs use 16 to 256 candidates.""",
        least=0,
        most=1,
    ),
    prune_drop=Field(0.01, "Weight that each drifted token takes away, from 1 down to 0.", least=0, most=1),
    prune_base=Field(
        0.5,
        """Added to the weight of every token. With 0, tokens after 1 / `release.prune_drop` drifted ones are
        not supervised.""",
        least=0,
    ),
)
def _drift_decay(scores, segments: Segments, config, step, key) -> Proposal:
    """Lowers the weight with every token at which teacher and student disagree on what may come next.

    A token has drifted where fewer than the share `prune_overlap` of the student's K candidates are among
    the teacher's K best. w_t = max(1 - prune_drop x (drifted tokens up to and including t), 0) + prune_base.

    Source: Prune-OPD, arXiv 2605.07804, for the overlap and the monotone decay; formula and defaults as two
    public re-implementations of the authors' code give them. Ours: K is scoring.candidates for both. With
    prune_base=0, `release.stop=rule` ends responses where their weight reaches 0.
    """
    drifted_BT = segments.mask_BT & (scores.overlap_BT < config.prune_overlap)
    drifted_BT = jnp.cumsum(drifted_BT.astype(jnp.int32), axis=1)
    weight_BT = jnp.maximum(1 - config.prune_drop * drifted_BT, 0) + config.prune_base
    return propose(weight_BT, segments)


@rule(
    "ta_opd",
    ta_share=Field(
        0.05, "Share of each response's tokens that is supervised, above 0 and at most 1.", least=1e-6, most=1
    ),
)
def _teachable(scores, segments: Segments, config, step, key) -> Proposal:
    """Supervises the share `ta_share` of each response's tokens with the largest divergence x compatibility.

    On the student's K candidates: the divergence is KL(teacher || student), both renormalised over the
    candidates; the compatibility is the teacher's probability of them. Each is stretched so that its 5%
    and 95% quantiles over the response are 0 and 1, and clipped; one that is the same everywhere counts as
    1. Equal products go by position.

    Source: TA-OPD, "Not All Disagreement Is Learnable", arXiv 2605.26844, whose text was not at hand: the two
    factors are in its abstract, the quantiles in a public re-implementation (which also takes the divergence
    on the union with the teacher's top K). Ours: the share and the quantiles are of each response.
    """
    divergence_BT, compatibility_BT = _divergence_and_compatibility(scores)
    score_BT = _stretch(divergence_BT, segments.mask_BT) * _stretch(compatibility_BT, segments.mask_BT)
    chosen_BT = _largest(score_BT, segments.mask_BT, _tokens_of_share(config.ta_share, segments))
    return propose(chosen_BT.astype(jnp.float32), segments)


def _count(flag_BT) -> jax.Array:
    return jnp.sum(flag_BT, axis=1, dtype=jnp.int32)


def _margin_drop(scores, segments: Segments, config) -> ChangePoint:
    """The paper's change point: the drop of log(1 + mean teacher margin)."""
    score_BT = jnp.log1p(segment_mean(scores.contrast_BT, segments))
    return change_point(score_BT, segments.last_BT, min_segments=config.min_segments)


def _margin_kept(scores, segments: Segments, config) -> jax.Array:
    """kept_B, the tokens that the paper's rule keeps."""
    cut_B1 = _margin_drop(scores, segments, config).cut_B[:, None]
    return _count(segments.mask_BT & (segments.order_BT < cut_B1))


def _tokens_of_share(share, segments: Segments) -> jax.Array:
    """share (a number, or one a row) of each response in whole tokens, rounded, at least 1."""
    length_B = _count(segments.mask_BT)
    return jnp.maximum(jnp.round(share * length_B), 1).astype(jnp.int32)


def _up_to(point: ChangePoint, segments: Segments) -> Proposal:
    """Weight 1 on the segments before the change point."""
    weight_BT = (segments.order_BT < point.cut_B[:, None]).astype(jnp.float32)
    return Proposal(weight_BT, point.cut_B, point.accepted_B, point.gain_B)


def _first_tokens(tokens, segments: Segments) -> Proposal:
    """Weight 1 on the first `tokens` (a number, or one a row) response tokens."""
    before_BT = jnp.cumsum(segments.mask_BT, axis=1, dtype=jnp.int32) - segments.mask_BT
    kept_BT = before_BT < jnp.broadcast_to(tokens, segments.mask_BT.shape[:1])[:, None]
    return propose(kept_BT.astype(jnp.float32), segments)


def propose(weight_BT, segments: Segments) -> Proposal:
    """The Proposal of a rule without a test of its own: the weights, and released is what has none."""
    on_BT = segments.mask_BT & (weight_BT > 0)
    seen_BT = jax.lax.cummax(jnp.where(on_BT, segments.order_BT, -1), axis=1)
    first_BT = on_BT & (segments.order_BT > scans.preceding(seen_BT, -1))  # of its segment
    return Proposal(
        weight_BT=weight_BT,
        cut_B=_count(first_BT),
        accepted_B=_count(on_BT) < _count(segments.mask_BT),
        gain_B=jnp.zeros(on_BT.shape[:1], jnp.float32),
    )


def _candidate_kl(scores):
    """KL(student || teacher) in nats, over the student's candidates and all other tokens as one more."""
    student_BTK, teacher_BTK = scores.student_topk_logp_BTK, scores.teacher_topk_logp_BTK
    mass_BTK = jnp.exp(student_BTK)
    kl_BT = jnp.where(mass_BTK > 0, mass_BTK * (student_BTK - teacher_BTK), 0).sum(axis=-1)
    rest_BT, rest_of_teacher_BT = (
        jnp.clip(1 - jnp.exp(x).sum(axis=-1), jnp.finfo(jnp.float32).eps, 1)
        for x in (student_BTK, teacher_BTK)
    )
    return kl_BT + rest_BT * (jnp.log(rest_BT) - jnp.log(rest_of_teacher_BT))


def _divergence_and_compatibility(scores):
    """TA-OPD's two factors, [B, T]: nats, and a probability."""
    student_BTK = jax.nn.log_softmax(scores.student_topk_logp_BTK)
    teacher_BTK = jax.nn.log_softmax(scores.teacher_topk_logp_BTK)
    mass_BTK = jnp.exp(teacher_BTK)
    divergence_BT = jnp.where(mass_BTK > 0, mass_BTK * (teacher_BTK - student_BTK), 0).sum(axis=-1)
    return divergence_BT, jnp.exp(scores.teacher_topk_logp_BTK).sum(axis=-1)


def _stretch(value_BT, mask_BT) -> jax.Array:
    """Values between two quantiles of the row's response tokens, mapped to [0, 1] and clipped."""
    ranked_BT = jnp.sort(jnp.where(mask_BT, value_BT, jnp.inf), axis=1)
    last_B = jnp.maximum(_count(mask_BT) - 1, 0)

    def quantile(q):
        place_B = q * last_B
        below_B = jnp.floor(place_B).astype(jnp.int32)
        above_B = jnp.minimum(below_B + 1, last_B)
        x_B2 = jnp.take_along_axis(ranked_BT, jnp.stack([below_B, above_B], axis=1), axis=1)
        return x_B2[:, 0] + (x_B2[:, 1] - x_B2[:, 0]) * (place_B - below_B)

    low_B, high_B = quantile(LOW_QUANTILE), quantile(HIGH_QUANTILE)
    spread_B1 = (high_B - low_B)[:, None]
    unit_BT = (value_BT - low_B[:, None]) / jnp.where(spread_B1 > 0, spread_B1, 1)
    return jnp.where(spread_B1 > 0, jnp.clip(unit_BT, 0, 1), 1)


def _largest(value_BT, mask_BT, count_B) -> jax.Array:
    """The `count` largest values of each row inside the mask; of equal ones the first."""
    value_BT = jnp.where(mask_BT, value_BT, -jnp.inf)
    ranked_BT = jnp.sort(value_BT, axis=1, descending=True)
    least_B1 = jnp.take_along_axis(ranked_BT, count_B[:, None] - 1, axis=1)
    above_BT = value_BT > least_B1
    tied_BT = mask_BT & (value_BT == least_B1)
    room_B1 = (count_B - _count(above_BT))[:, None]
    return above_BT | (tied_BT & (jnp.cumsum(tied_BT, axis=1) <= room_B1))
