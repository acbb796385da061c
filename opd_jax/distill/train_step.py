"""One training step, one compiled program: score, release, loss, gradient, update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax import release as releasing
from opd_jax.distill import loss, objectives, packing, scoring, trainable
from opd_jax.distill.optimizer import learning_rate
from opd_jax.distill.repeats import repeated_tail
from opd_jax.distill.types import (
    Ends,
    LossInputs,
    LossPart,
    Rollouts,
    StepInputs,
    Stops,
    Supervision,
    TrainState,
)
from opd_jax.models import ModelConfig, moe
from opd_jax.release.segments import segment

POSITION_BINS = 20


def make_train_step(student: ModelConfig, teacher: ModelConfig, config, optimizer):
    """Builds train_step(state, inputs), a pure function; jit it with the state donated.

    Args:
      student, teacher: the models' configs.
      config: the whole config; reads objective.*, reward.*, scoring.*, release.*, train.*.
      optimizer: what `make_optimizer` returned, or any optax transformation of the trained parameters.

    Returns:
      A function (TrainState, StepInputs) -> (TrainState, metrics, Supervision). metrics is a dict of float32
      scalars and [20] lists, summed or averaged over the response tokens of the whole batch.
    """
    train = config.train
    objective = objectives.OBJECTIVES[config.objective.name]
    schedule = learning_rate(config)
    update = make_update(
        loss.Loss.of(student, teacher, config),
        optimizer,
        config.rollout.batch // train.micro_batch,
        pack=train.pack,
    )

    def train_step(state: TrainState, inputs: StepInputs):
        rollouts, reward_B = inputs.rollouts, inputs.reward_B
        scores, released, loss_inputs = supervise(student, teacher, config, state.params, state.step, inputs)
        supervision = Supervision(scores=scores.per_token(), release=released)
        tokens = response_tokens(rollouts)
        trained, frozen = trainable.split(state.params, train.frozen)
        carry, fixed = (trained, state.opt_state), (frozen, inputs.teacher_params, tokens)
        if train.updates_per_rollout == 1:
            carry, (mean_loss, norm, skipped, load, computed) = update(carry, loss_inputs, *fixed)
        else:
            carry, measured = jax.lax.scan(
                lambda carry, _: update(carry, loss_inputs, *fixed), carry, length=train.updates_per_rollout
            )
            mean_loss, norm, _, load, computed = jax.tree.map(lambda x: x[0], measured)
            skipped = measured[2].sum()
        metrics = measure(rollouts, supervision) | {
            "loss": mean_loss,
            "grad_norm": norm,
            "skipped_updates": jnp.float32(skipped),
            "learning_rate": jnp.float32(schedule(state.step * train.updates_per_rollout)),
            "computed_in_gradient": computed,
        }
        if scores.computed is not None:
            metrics["computed_in_scoring"] = scores.computed
        if rollouts.stops is not None:
            metrics |= measure_stops(rollouts, rollouts.stops, supervision.release)
        if weighs_draws(config):
            weight_BT = importance(rollouts, scores, config)
            metrics["kl"] = -(weight_BT * scores.advantage_BT).sum() / tokens
            metrics["importance_weight"] = weight_BT.sum() / tokens
            metrics["importance_capped"] = (weight_BT >= config.objective.importance_cap).sum() / tokens
        if objective.writer == "teacher":
            metrics["kl"] = -metrics["kl"]  # log T - log S of the teacher's own tokens: KL(T || S)
        if loss_inputs.targets.top is not None:
            entropy_BT = jnp.where(rollouts.mask_BT, loss_inputs.targets.top.entropy_BT, 0)
            metrics["teacher_entropy"] = entropy_BT.sum() / tokens
        if reward_B is not None:
            metrics["reward"] = jnp.nanmean(reward_B)
            metrics["graded_share"] = 1 - jnp.isnan(reward_B).mean()
        metrics |= router_metrics("teacher", scores.teacher_load) | router_metrics("student", load)
        trained, opt_state = carry
        return TrainState(state.step + 1, trainable.join(trained, frozen), opt_state), metrics, supervision

    return train_step


def supervise(
    student: ModelConfig, teacher: ModelConfig, config, params: dict, step, inputs: StepInputs
) -> tuple[scoring.Scores, releasing.Release, LossInputs]:
    """What the teacher says of a batch, what a rule keeps of it, and what the loss reads.

    Args:
      params: the student's, read only where its scores are recomputed.
      step: TrainState.step.
    """
    objective, rollouts = objectives.OBJECTIVES[config.objective.name], inputs.rollouts
    how = scoring.Scoring(
        chunk=config.scoring.chunk,
        micro_batches=config.rollout.batch // config.train.micro_batch,
        pack=config.train.pack,
        keep=objective.teacher,
        top_k=config.objective.top_k,
    )
    recomputed = (student, params) if recomputes(config) else None
    with jax.named_scope("score"):
        if rollouts.scores is None:
            scores = scoring.score(teacher, inputs.teacher_params, rollouts, how, student=recomputed)
        elif recomputed is None:
            scores = rollouts.scores
        else:
            scores = scoring.with_student(rollouts.scores, recomputed, rollouts, how)
    with jax.named_scope("release"):
        segment_BT = segment(inputs.table, rollouts.response_BT, rollouts.mask_BT)
        read_BT = rollouts.mask_BT
        if rollouts.scores is not None:  # a row that the rule has stopped ends in mid-sentence
            assert rollouts.stops is not None
            stopped_B1 = rollouts.stops.stopped_B[:, None]
            read_BT = jnp.where(stopped_B1, releasing.ended(segment_BT, read_BT), read_BT)
        released = releasing.release(
            scores,
            segment_BT,
            read_BT,
            config.release,
            step=step,
            key=jax.random.fold_in(inputs.key, step),
        )
    advantage_BT = loss.advantage(
        scores.advantage_BT, config.objective.advantage_clip, config.reward.weight, inputs.reward_B
    )
    if objective.advantage and weighs_draws(config):
        advantage_BT *= importance(rollouts, scores, config)
    ends = None
    if config.objective.end_weight and student.eos_ids:  # a model without end tokens never ends
        weight_BT = jnp.where(rollouts.mask_BT, jnp.float32(config.objective.end_weight), 0)
        ends = Ends(weight_BT=weight_BT, stop_BT=scores.teacher_stop_BT)
    loss_inputs = LossInputs(
        rollouts=rollouts.replace(logp_BT=scores.student_logp_BT, scores=None, stops=None),
        advantage_BT=advantage_BT,
        weight_BT=released.weight_BT,
        targets=scores.targets,
        ends=ends,
    )
    return scores, released, loss_inputs


def weighs_draws(config) -> bool:
    """Whether A gets importance weights: the student's tokens are not drawn from its own distribution."""
    r = config.rollout
    shaped = r.temperature != 1 or r.top_k > 0 or r.top_p < 1 or r.min_p > 0
    student_writes = objectives.OBJECTIVES[config.objective.name].writer == "student"
    return bool(shaped and student_writes and config.objective.importance_cap)


def importance(rollouts: Rollouts, scores: scoring.Scores, config):
    """The importance weight of each response token; 0 outside the response."""
    weight_BT = loss.importance(
        scores.student_logp_BT, rollouts.behaviour_logp_BT, config.objective.importance_cap
    )
    return jnp.where(rollouts.mask_BT, weight_BT, 0)


def recomputes(config) -> bool:
    """Whether scoring runs the student too: where configured, and on responses that the teacher wrote.

    auto does where the sampler's rounding would count: a second update on the same rollouts begins from a
    ratio S / S_old of 1, and an int8 cache rounds coarsely.
    """
    if objectives.OBJECTIVES[config.objective.name].writer == "teacher":
        return True
    if config.scoring.student == "auto":
        return config.train.updates_per_rollout > 1 or config.rollout.cache_dtype == "int8"
    return config.scoring.student == "recompute"


def make_update(loss_fn, optimizer: optax.GradientTransformation, micro_batches: int, *, pack: bool = True):
    """Builds update(carry, inputs, *fixed): the gradient, summed over micro-batches, then the optimizer.

    If the loss or the gradient is not finite, the update is skipped: parameters and optimizer state stay.

    Args:
      loss_fn: a `Loss`, or what takes and returns the same.
      pack: as `Scoring.pack`. What follows a row's last weighed token is not computed.

    Returns:
      A function ((trained, opt_state), LossInputs, *fixed) -> (the same after the update, (the loss summed
      over the micro-batches, the gradient's norm, whether the update was skipped, the moe.Load or None, the
      share of the batch's positions that was computed)). `fixed` is what loss_fn takes after its inputs.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def update(carry, inputs: LossInputs, *fixed) -> tuple[Any, Any]:
        trained, opt_state = carry
        with jax.named_scope("gradient"):
            ((value, load), grads), computed = sum_of_parts(
                lambda part: gradient(trained, part, *fixed), inputs, micro_batches, pack=pack
            )
        with jax.named_scope("update"):
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            changes, next_state = optimizer.update(grads, opt_state, trained, finite=finite)

            def accept(new, old):
                on_host = jax.typeof(old).memory_space == jax.memory.Space.Host
                return new if on_host else jnp.where(finite, new, old)  # `from_host` has decided already

            trained = jax.tree.map(accept, optax.apply_updates(trained, changes), trained)
            opt_state = jax.tree.map(accept, next_state, opt_state)
        return (trained, opt_state), (value, norm, ~finite, load, computed)

    return update


def sum_of_parts(fn, inputs: LossInputs, micro_batches: int, *, pack: bool = True):
    """(the sum of fn(part of the inputs) over micro-batches, the share of their positions that was computed).

    Args:
      fn: takes LossInputs or LossPart, and returns a pytree.
      pack: as `Scoring.pack`.
    """
    if micro_batches == 1:
        return fn(inputs), jnp.float32(1)
    packed = packing.pack(inputs.rollouts.prompt_mask_BP, inputs.weighed_BT, together=pack)
    total = packing.summed(
        lambda piece: fn(LossPart(piece.sequences, piece.taken(inputs.per_token))),
        packed,
        inputs.rollouts,
        micro_batches,
    )
    return total, packing.rounds(packed, micro_batches) / micro_batches


def response_tokens(rollouts: Rollouts):
    """Response tokens of a batch, float32, at least 1."""
    return jnp.maximum(rollouts.mask_BT.sum(), 1).astype(jnp.float32)


def router_metrics(model: str, load: moe.Load | None) -> dict:
    """MODEL_router_... of `moe.statistics`; none without experts."""
    if load is None:
        return {}
    return {f"{model}_router_{name}": value for name, value in moe.statistics(load).items()}


def measure(rollouts: Rollouts, supervision: Supervision) -> dict:
    """The step's numbers, all on device: means over response tokens or rollouts, and binned sums.

    Bins are 20 equal parts of each response's own length; release_histogram counts accepted cuts by the
    share of the response that stays supervised.
    """
    scores, released, mask_BT = supervision.scores, supervision.release, rollouts.mask_BT
    tokens = response_tokens(rollouts)
    length_B = mask_BT.sum(axis=1)
    accepted_B = released.accepted_B
    accepted = accepted_B.sum()
    kept_share_B = released.kept_B / jnp.maximum(length_B, 1)

    def mean(x_BT):
        return jnp.where(mask_BT, x_BT, 0).sum() / tokens

    place_BT = jnp.arange(mask_BT.shape[1])[None] * POSITION_BINS // jnp.maximum(length_B, 1)[:, None]
    bin_BT = jnp.where(mask_BT, place_BT, POSITION_BINS)  # one past the end is in no sum

    def by_position(x_BT):
        return binned(bin_BT, x_BT)

    cut_bin_B = jnp.minimum((kept_share_B * POSITION_BINS).astype(jnp.int32), POSITION_BINS - 1)
    advantage_mean = mean(scores.advantage_BT)
    variance = mean((scores.advantage_BT - advantage_mean) ** 2)
    per_accepted = jnp.where(accepted > 0, 1.0 / jnp.maximum(accepted, 1), jnp.nan)
    supervised = released.mask_BT.sum()
    return {
        "kl": -advantage_mean,
        "advantage_std": jnp.sqrt(variance),
        "contrast": mean(scores.contrast_BT),
        "teacher_logp": mean(scores.teacher_logp_BT),
        "stop_probability": mean(rollouts.stop_BT),
        "teacher_stop_probability": mean(scores.teacher_stop_BT),
        "response_tokens": mask_BT.sum(),
        "supervised_tokens": supervised,
        "kept_share": supervised / tokens,
        "accepted_share": accepted_B.mean(),
        "release_position": jnp.where(accepted_B, kept_share_B, 0).sum() * per_accepted,
        "gain": jnp.where(accepted_B, released.gain_B, 0).sum() * per_accepted,
        "response_length": length_B.mean(),
        "finished_share": rollouts.finished_B.mean(),
        "repeated_share": repeated_tail(rollouts.response_BT, mask_BT, rollouts.finished_B).mean(),
        "position_tokens": by_position(mask_BT.astype(jnp.float32)),
        "position_kept_tokens": by_position(released.mask_BT.astype(jnp.float32)),
        "position_contrast_sum": by_position(scores.contrast_BT),
        "position_advantage_sum": by_position(scores.advantage_BT),
        "position_advantage_sq_sum": by_position(scores.advantage_BT**2),
        "release_histogram": binned(cut_bin_B, accepted_B.astype(jnp.float32)),
    }


AGREES = 0.1  # a cut that is no further from the whole response's, as a share of its length


def measure_stops(rollouts: Rollouts, stops: Stops, released: releasing.Release) -> dict:
    """How rows ended, and what the audited rows say, those written to their ends; see docs/metrics.md."""
    length_B, audit_B = rollouts.mask_BT.sum(axis=1), stops.audit_B

    def of_audited(x_B):
        count = audit_B.sum()
        return jnp.where(audit_B, x_B, 0).sum() * jnp.where(count > 0, 1.0 / jnp.maximum(count, 1), jnp.nan)

    found = {
        "stopped_share": stops.stopped_B.mean(),
        "limit_share": (~stops.stopped_B & ~rollouts.finished_B).mean(),
        "audit_rows": audit_B.sum(),
        "audit_length": of_audited(length_B),
    }
    if rollouts.scores is None:
        return found
    certain_B = stops.certain_B > 0
    near_B = jnp.abs(stops.kept_B - released.kept_B) <= AGREES * length_B
    return found | {
        # A row of which the rule is never certain is written to its end, and then the rule has its say.
        "audit_agreement": of_audited(~certain_B | (released.accepted_B & near_B)),
        "audit_written": of_audited(jnp.where(certain_B, stops.certain_B, length_B)),
    }


def binned(bin_, x):
    """[POSITION_BINS] sums of x over the entries of each bin.

    Masked sums, no scatter: a TPU sorts a scatter's indices first, and takes long to compile it.
    """
    bins = jnp.arange(POSITION_BINS).reshape(-1, *(1,) * x.ndim)
    return jnp.where(bin_[None] == bins, x[None], 0).sum(axis=range(1, x.ndim + 1), dtype=jnp.float32)
