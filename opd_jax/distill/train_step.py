"""One training step, one compiled program: score, release, loss, gradient, update."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from opd_jax import release as releasing
from opd_jax.distill import loss, objectives, scoring, trainable
from opd_jax.distill.repeats import repeated_tail
from opd_jax.distill.rollout import Rollouts
from opd_jax.models import ModelConfig, moe, transformer
from opd_jax.release.segments import segment

POSITION_BINS = 20


@struct.dataclass
class TrainState:
    """What training changes.

    Attributes:
      step: int32 scalar, updates of the policy's rollouts done; the next rollout's number.
      params: the student's parameters, float32 masters.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


@struct.dataclass
class Lesson:
    """What a gradient is taken of: the rollouts, and how much each of their tokens counts.

    Attributes:
      rollouts: with the student's log-probabilities that the advantage was made with.
      advantage_BT: nats, as the loss sees it: clipped, and with the task reward mixed in.
      weight_BT: the release rule's weight times the rescale; 0 outside the response.
      targets: what the objective needs of the teacher beside.
      ends: how the end of a response is taught beside the objective; None without objective.end_weight.
    """

    rollouts: Rollouts
    advantage_BT: jax.Array
    weight_BT: jax.Array
    targets: scoring.Targets
    ends: loss.Ends | None = None


@struct.dataclass
class Supervision:
    """What a step decided for each rollout; for the report, never needed to go on."""

    scores: scoring.Scores
    release: releasing.Release


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW with clipping by global norm and a warm-up to a constant, linear or cosine schedule.

    With optimizer.b1 = 0 the first moment is the gradient itself and is not kept. It takes the gradients of
    the parameters that train.frozen leaves to train (`trainable.split`).

    Args:
      config: the whole config; reads optimizer.* and train.steps, train.updates_per_rollout, train.frozen.
        With optimizer.memory = host the update brings the moments to the devices, and back.
    """
    o = config.optimizer
    if o.b1:
        scale = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.mu_dtype)
    else:
        scale = optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False, bias_correction=True)
    adamw = optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(o.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    adamw = from_host(adamw) if o.memory == "host" else adamw
    return trainable.alone(adamw, config.train.frozen)


def from_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, of moments that lie in the hosts' memory: each update fetches them and returns them.

    It does so in a branch that is always taken. A compiler that saw through it would fetch them early, to
    hide the copies, and the moments would lie beside the activations after all.
    """

    def update(grads, state, params=None):
        lies = jax.tree.map(lambda x: jax.typeof(x).memory_space, state)

        def fetched(grads, state, params):
            state = jax.device_put(state, jax.memory.Space.Device)
            changes, state = optimizer.update(grads, state, params)
            return changes, jax.tree.map(jax.device_put, state, lies)

        def unchanged(grads, state, params):
            return jax.tree.map(jnp.zeros_like, grads), state

        count = next(x for x in jax.tree.leaves(state) if x.ndim == 0)
        return jax.lax.cond(count >= 0, fetched, unchanged, grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def learning_rate(config) -> optax.Schedule:
    """Learning rate by update number, as optimizer.* says."""
    o = config.optimizer
    total = config.train.steps * config.train.updates_per_rollout
    after = max(total - o.warmup_steps, 1)
    tail = {
        "constant": lambda: optax.constant_schedule(o.learning_rate),
        "linear": lambda: optax.linear_schedule(o.learning_rate, 0.0, after),
        "cosine": lambda: optax.cosine_decay_schedule(o.learning_rate, after),
    }[o.schedule]()
    if not o.warmup_steps:
        return tail
    first = o.learning_rate / o.warmup_steps  # so that update n of w has n / w of the rate
    rise = optax.linear_schedule(first, o.learning_rate, max(o.warmup_steps - 1, 1))
    return optax.join_schedules([rise, tail], [o.warmup_steps])


def recomputes(config) -> bool:
    """Whether scoring runs the student too: as configured, and on what the teacher wrote and scored."""
    writer = objectives.OBJECTIVES[config.objective.name].writer
    return config.scoring.student == "recompute" or writer == "teacher"


def make_train_step(student: ModelConfig, teacher: ModelConfig, config, optimizer):
    """Builds train_step(state, teacher_params, rollouts, table, key, reward_B).

    Args:
      student, teacher: the models' configs.
      config: the whole config; reads objective.*, reward.*, scoring.*, release.*, train.*.
      optimizer: what `make_optimizer` returned, or any optax transformation of the trained parameters.

    Returns:
      A pure function that returns (state, metrics, Supervision); jit it with the state donated. `table` is
      the SegmentTable; `key` is a PRNG key of the run, from which release rules that draw do so with the
      step's number; `reward_B`, needed only with a reward.weight, is the reward of each response, NaN where
      there is none; metrics is a dict of float32 scalars and [20] lists, summed or averaged over response
      tokens of the whole batch.
    """
    train = config.train
    micro_batches = config.rollout.batch // train.micro_batch
    objective = objectives.OBJECTIVES[config.objective.name]
    schedule = learning_rate(config)
    mean_loss = make_loss(student, teacher, config)

    def train_step(state: TrainState, teacher_params, rollouts: Rollouts, table, key, reward_B=None):
        scores, released, lesson = supervise(
            student, teacher, config, state.params, state.step, teacher_params, rollouts, table, key, reward_B
        )
        supervision = Supervision(scores=scores.per_token(), release=released)
        tokens = response_tokens(rollouts)

        def piece_loss(params, piece):
            return mean_loss(params, piece, teacher_params, tokens)

        trained, kept = trainable.split(state.params, train.frozen)

        def update(carry, _):
            trained, opt_state = carry
            with jax.named_scope("gradient"):
                (loss, load), grads = accumulated_gradient(
                    lambda trained, piece: piece_loss(trainable.join(trained, kept), piece),
                    trained,
                    lesson,
                    micro_batches,
                )
            with jax.named_scope("update"):
                changes, opt_state = optimizer.update(grads, opt_state, trained)
                trained = optax.apply_updates(trained, changes)
            return (trained, opt_state), (loss, optax.tree.norm(grads), load)

        carry = trained, state.opt_state
        if train.updates_per_rollout == 1:
            carry, (loss, norm, load) = update(carry, None)
        else:
            carry, measured = jax.lax.scan(update, carry, length=train.updates_per_rollout)
            loss, norm, load = jax.tree.map(lambda x: x[0], measured)
        metrics = measure(rollouts, supervision) | {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.float32(schedule(state.step * train.updates_per_rollout)),
        }
        if objective.writer == "teacher":
            metrics["kl"] = -metrics["kl"]  # log T - log S of the teacher's own tokens: KL(T || S)
        if lesson.targets.top is not None:
            entropy_BT = jnp.where(rollouts.mask_BT, lesson.targets.top.entropy_BT, 0)
            metrics["teacher_entropy"] = entropy_BT.sum() / tokens
        if reward_B is not None:
            metrics["reward"] = jnp.nanmean(reward_B)
            metrics["graded_share"] = 1 - jnp.isnan(reward_B).mean()
        metrics |= router_metrics("teacher", scores.teacher_load) | router_metrics("student", load)
        trained, opt_state = carry
        return TrainState(state.step + 1, trainable.join(trained, kept), opt_state), metrics, supervision

    return train_step


def supervise(
    student: ModelConfig,
    teacher: ModelConfig,
    config,
    params: dict,
    step,
    teacher_params: dict,
    rollouts: Rollouts,
    table,
    key,
    reward_B=None,
) -> tuple[scoring.Scores, releasing.Release, Lesson]:
    """What the teacher says of a batch, what a rule keeps of it, and what the loss reads.

    Args:
      params: the student's, read only where its scores are recomputed.
      step: TrainState.step.
      others: see `make_train_step`.
    """
    objective = objectives.OBJECTIVES[config.objective.name]
    with jax.named_scope("score"):
        scores = scoring.score(
            teacher,
            teacher_params,
            rollouts,
            chunk=config.scoring.chunk,
            micro_batches=config.rollout.batch // config.train.micro_batch,
            student=(student, params) if recomputes(config) else None,
            keep=objective.teacher,
            top_k=config.objective.top_k,
        )
    with jax.named_scope("release"):
        segment_BT = segment(table, rollouts.response_BT, rollouts.mask_BT)
        released = releasing.release(
            scores,
            segment_BT,
            rollouts.mask_BT,
            config.release,
            step=step,
            key=jax.random.fold_in(key, step),
        )
    advantage_BT = loss.advantage(
        scores.advantage_BT, config.objective.advantage_clip, config.reward.weight, reward_B
    )
    ends = None
    if config.objective.end_weight and student.eos_ids:  # a model without end tokens never ends
        weight_BT = jnp.where(rollouts.mask_BT, jnp.float32(config.objective.end_weight), 0)
        ends = loss.Ends(weight_BT=weight_BT, stop_BT=scores.teacher_stop_BT)
    return (
        scores,
        released,
        Lesson(
            rollouts=rollouts.replace(logp_BT=scores.student_logp_BT),
            advantage_BT=advantage_BT,
            weight_BT=released.weight_BT,
            targets=scores.targets,
            ends=ends,
        ),
    )


def make_loss(student: ModelConfig, teacher: ModelConfig, config):
    """Builds loss(params, lesson, teacher_params, tokens), differentiable in params.

    It returns the objective's weighted sum over the lesson's rollouts, divided by `tokens`, the response
    tokens of the whole batch, of which the lesson may be a part; and the student's moe.Load or None.
    """
    options = objectives.options(config)
    needs_head = objectives.OBJECTIVES[config.objective.name].teacher == "logits"

    def loss(params: dict, lesson: Lesson, teacher_params: dict, tokens):
        total, load = loss.loss_sum(
            config.objective.name,
            options,
            student,
            params,
            lesson.rollouts,
            lesson.advantage_BT,
            lesson.weight_BT,
            chunk=config.scoring.chunk,
            remat=config.train.remat,
            targets=lesson.targets,
            teacher=(teacher, transformer.head(teacher, teacher_params) if needs_head else None),
            ends=lesson.ends,
        )
        return total / tokens, load

    return loss


def response_tokens(rollouts: Rollouts):
    """Response tokens of a batch, float32, at least 1."""
    return jnp.maximum(rollouts.mask_BT.sum(), 1).astype(jnp.float32)


def accumulated_gradient(loss, params, batch, micro_batches: int):
    """((value, aux), gradient) of the sums of loss(params, piece) over the micro-batches of a batch.

    Args:
      loss: returns (a scalar to be differentiated, any pytree of arrays or None).
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        return gradient(params, batch)

    def accumulate(total, piece):
        return jax.tree.map(jnp.add, total, gradient(params, piece)), None

    pieces = scoring.split(batch, micro_batches)
    first = jax.tree.map(lambda x: x[0], pieces)
    (_, aux), _ = jax.eval_shape(gradient, params, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux)
    start = (jnp.float32(0), zero), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(accumulate, start, pieces)[0]


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


def binned(bin_, x):
    """[POSITION_BINS] sums of x over the entries of each bin.

    Masked sums, no scatter: a TPU sorts a scatter's indices first, and takes long to compile it.
    """
    bins = jnp.arange(POSITION_BINS).reshape(-1, *(1,) * x.ndim)
    return jnp.where(bin_[None] == bins, x[None], 0).sum(axis=range(1, x.ndim + 1), dtype=jnp.float32)
