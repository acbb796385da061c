"""What flows through a step: rollouts, scores, what a rule decided, what a loss reads, and the state.

Frozen dataclasses, which are pytrees. An array's name ends in its shape: B rollouts, P prompt positions,
T response positions, L = P + T, D model width, K candidates.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import struct

from opd_jax.models import moe, transformer
from opd_jax.release import Release
from opd_jax.release.segments import SegmentTable

# A jax.Array; NumPy's on the host; where only shapes or places are told, a ShapeDtypeStruct or a sharding.
Array = Any


class Rollouts(struct.PyTreeNode):
    """A batch of sampled responses. Past a row's end every field is 0, False or pad.

    Attributes:
      tokens_BL: int32 ids; prompt left-padded to P, then the response right-padded to T.
      prompt_mask_BP: real prompt tokens.
      mask_BT: response tokens, the end-of-sequence token included.
      logp_BT: the student's log-probability of each token in nats: temperature 1, no truncation, whatever
        it was sampled with.
      behaviour_logp_BT: the log-probability under the distribution that the token was drawn from.
      topk_BTK: ids of the student's K most likely tokens at each position, most likely first.
      topk_logp_BTK: the student's log-probabilities of them in nats, as logp_BT's.
      stop_BT: the student's probability of an end token at each position.
      finished_B: ended by an end token, not by the length limit.
      scores: the teacher's Scores, if it has read along; then `train_step` makes none.
      stops: what ended rows early; None with release.stop=never.
    """

    tokens_BL: Array
    prompt_mask_BP: Array
    mask_BT: Array
    logp_BT: Array
    behaviour_logp_BT: Array
    topk_BTK: Array
    topk_logp_BTK: Array
    stop_BT: Array
    finished_B: Array
    scores: "Scores | None" = None
    stops: "Stops | None" = None

    @property
    def response_BT(self):
        """Ids of the response."""
        return self.tokens_BL[:, self.prompt_mask_BP.shape[1] :]

    @property
    def sequences(self) -> "Sequences":
        """Each row as a sequence of its own, where it lies."""
        p, t = self.prompt_mask_BP.shape[1], self.mask_BT.shape[1]
        mask_BL = jnp.concatenate([self.prompt_mask_BP, self.mask_BT], axis=1)
        slot_L = jnp.arange(p + t) - (p - 1)
        slot_L = jnp.where((slot_L >= 0) & (slot_L < t), slot_L, t)
        return Sequences(
            tokens_RL=self.tokens_BL,
            row_RL=mask_BL.astype(jnp.int32),
            position_RL=transformer.positions(mask_BL),
            place_RT=jnp.broadcast_to(jnp.arange(p - 1, p - 1 + t)[None], self.mask_BT.shape),
            slot_RL=jnp.broadcast_to(slot_L[None], mask_BL.shape),
            slots=last_position(self.mask_BT).max(),
        )


class Stops(struct.PyTreeNode):
    """Which rows ended early, and what would have become of those that were left alone.

    Attributes:
      stopped_B: ended by release.stop.
      audit_B: drawn to be written to the end whatever release.stop says.
      certain_B: tokens that were written when the release was first certain; 0 if it never was.
      kept_B: tokens that the rule kept then.
    """

    stopped_B: Array
    audit_B: Array
    certain_B: Array
    kept_B: Array


class Sequences(struct.PyTreeNode):
    """What a forward pass reads: R sequences, each with one row of a batch, or with several.

    Attributes:
      tokens_RL: int32 ids.
      row_RL: which row a token belongs to, as a number above 0 that no other row of the sequence has; 0 at
        padding. A token sees its own row alone.
      position_RL: a token's rotary position, the number of tokens of its row before it.
      place_RT: where the hidden state lies that predicts each response token; L where there is none.
      slot_RL: which response token a position predicts, the inverse of place_RT; T where it predicts none.
      slots: scalar, the response tokens up to the last that matters, at most T.
    """

    tokens_RL: Array
    row_RL: Array
    position_RL: Array
    place_RT: Array
    slot_RL: Array
    slots: Array


class TeacherTop(struct.PyTreeNode):
    """The teacher's own most likely tokens; finite and without meaning outside the response.

    Attributes:
      top_BTK: ids, most likely first.
      logp_BTK: their log-probabilities and, last, that of all other ids together: [B, T, K + 1].
      entropy_BT: the teacher's entropy over the whole vocabulary, nats.
    """

    top_BTK: Array
    logp_BTK: Array
    entropy_BT: Array


class Targets(struct.PyTreeNode):
    """What some objectives need of the teacher besides Scores; all of it from the same forward pass.

    Attributes:
      hidden_BTD: final hidden states, from which the loss makes the teacher's logits chunk by chunk.
      top: TeacherTop.
    """

    hidden_BTD: Array | None = None
    top: TeacherTop | None = None


class Scores(struct.PyTreeNode):
    """What the teacher says of a batch of rollouts; float32, nats, 0 outside the response.

    Attributes:
      advantage_BT: A_t = log p_T(y_t) - log p_S(y_t).
      contrast_BT: M_t >= 0, the teacher's margin between its best two of the student's K candidates.
      teacher_logp_BT, student_logp_BT: log-probabilities of the response tokens at temperature 1.
      teacher_topk_logp_BTK, student_topk_logp_BTK: those of the student's K candidates, in its order.
      overlap_BT: no unit, the share of the student's K candidates that are among the teacher's K best.
      teacher_stop_BT: the teacher's probability of an end token at each position.
      targets: what `score` was asked to keep for the objective.
      teacher_load: how the teacher's routers spread the batch's tokens; None without experts.
      computed: the share of the batch's B x (P + T) positions that the models read, padding included.
    """

    advantage_BT: Array
    contrast_BT: Array
    teacher_logp_BT: Array
    student_logp_BT: Array
    teacher_topk_logp_BTK: Array | None
    student_topk_logp_BTK: Array | None
    overlap_BT: Array | None
    teacher_stop_BT: Array
    targets: Targets = Targets()
    teacher_load: moe.Load | None = None
    computed: Array | None = None

    def per_token(self) -> "Scores":
        """The scores without what only rules and objectives read: nothing of it need leave a program."""
        return self.replace(
            teacher_topk_logp_BTK=None,
            student_topk_logp_BTK=None,
            overlap_BT=None,
            targets=Targets(),
            teacher_load=None,
            computed=None,
        )


class Ends(struct.PyTreeNode):
    """How the end of a response is taught, in addition to the objective.

    Attributes:
      weight_BT: what each position counts; 0 outside the response.
      stop_BT: the teacher's probability of an end token.
    """

    weight_BT: Array
    stop_BT: Array


class LossInputs(struct.PyTreeNode):
    """The rollouts that a gradient is taken of, and how much each of their tokens counts.

    Attributes:
      rollouts: with the student's log-probabilities from which the advantage was made.
      advantage_BT: nats, as the loss sees it: clipped, and with the task reward mixed in.
      weight_BT: the release rule's weight times the rescale; 0 outside the response.
      targets: what the objective needs of the teacher besides the advantage.
      ends: how the end of a response is taught; None without objective.end_weight.
    """

    rollouts: Rollouts
    advantage_BT: Array
    weight_BT: Array
    targets: Targets = Targets()
    ends: Ends | None = None

    @property
    def weighed_BT(self):
        """Where a loss is taken at all."""
        ends_BT = self.ends.weight_BT != 0 if self.ends is not None else False
        return (self.weight_BT != 0) | ends_BT

    @property
    def sequences(self) -> Sequences:
        """Each row as a sequence of its own; no response token matters after the last that is weighed."""
        return self.rollouts.sequences.replace(slots=last_position(self.weighed_BT).max())

    @property
    def per_token(self) -> "PerToken":
        """What a loss reads of each response token besides hidden states.

        Outside the response stands id 0, which always exists: a pad id may have a logit of -inf.
        """
        r = self.rollouts
        token_BT = jnp.where(r.mask_BT, r.response_BT, 0)
        return PerToken(token_BT, r.logp_BT, self.advantage_BT, self.weight_BT, self.targets, self.ends)


class PerToken(NamedTuple):
    """What a loss reads of response tokens besides hidden states; arrays of [B, T, ...], as LossInputs'."""

    token_BT: Array
    old_logp_BT: Array
    advantage_BT: Array
    weight_BT: Array
    targets: Targets
    ends: Ends | None


class LossPart(NamedTuple):
    """A part of LossInputs whose rows may lie behind each other in sequences."""

    sequences: Sequences
    per_token: PerToken


class StepInputs(struct.PyTreeNode):
    """What a training step reads besides its state.

    Attributes:
      teacher_params: the teacher's parameters.
      rollouts: what was sampled.
      table: the SegmentTable.
      key: a PRNG key of the run. Release rules that draw do so from it and the step's number.
      reward_B: the reward of each response, NaN where there is none; needed only with a reward.weight.
    """

    teacher_params: dict
    rollouts: Rollouts
    table: SegmentTable
    key: Array
    reward_B: Array | None = None


class Supervision(struct.PyTreeNode):
    """What a step decided for each rollout; only the report reads it."""

    scores: Scores
    release: Release


class TrainState(struct.PyTreeNode):
    """What training changes.

    Attributes:
      step: int32 scalar, updates of the policy's rollouts done; the next rollout's number.
      params: the student's parameters, float32 masters.
      opt_state: the optimizer's state.
    """

    step: Array
    params: dict
    opt_state: optax.OptState


def last_position(mask_BT):
    """Positions of each row up to its last True, [B] int32."""
    t = mask_BT.shape[1]
    return jnp.where(mask_BT, jnp.arange(1, t + 1)[None], 0).max(axis=1).astype(jnp.int32)
