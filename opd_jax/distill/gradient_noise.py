"""How much of a batch's gradient is signal, with and without the tokens that a rule releases.

A separate program, run in addition to the training step where `metrics.gradient_noise_every` asks for it. It
scores the rollouts again and takes three gradients of the student, but changes nothing.
"""

import jax
import jax.numpy as jnp
import optax

from opd_jax.distill import trainable
from opd_jax.distill.loss import Loss
from opd_jax.distill.train_step import response_tokens, supervise
from opd_jax.distill.types import StepInputs
from opd_jax.models import ModelConfig
from opd_jax.parallel import shard_rows, sharding

# kept: the tokens and weights that the step trains on. all: every response token, with weight 1.
# released: those that the rule leaves out, with weight 1.
PARTS = ("kept", "all", "released")
LEAST_GROUPS = 16  # where the batch allows it: the noise is then known to about a fifth


def group_count(config, mesh) -> int | None:
    """The number of groups of whole prompts that a batch is cut into; None if it cannot be two or more.

    Every device that holds rows has a part of each group, and a group is no larger than a micro-batch.
    """
    prompts = config.rollout.batch // config.rollout.samples_per_prompt
    shards = sharding.pieces(mesh)
    fewest = max(2, config.rollout.batch // config.train.micro_batch)
    possible = [n for n in range(fewest, prompts // shards + 1) if prompts % (n * shards) == 0]
    return next((n for n in possible if n >= LEAST_GROUPS), possible[-1] if possible else None)


def make_gradient_noise(student: ModelConfig, teacher: ModelConfig, config, groups: int):
    """Builds gradient_noise(params, step, inputs).

    Args:
      student, teacher, config: see `train_step.make_train_step`.
      groups: n of `group_count`.

    Returns:
      A pure function of the student's parameters, TrainState.step and StepInputs. It returns float32 scalars
      for each of PARTS: `gradient_norm_PART`, |g| of the mean over the whole batch, and `gradient_snr_PART`,
      an estimate of |E g|^2 / E|g - E g|^2, the signal power over the noise power of the batch's gradient. 0
      (or, by chance, below) is pure noise. NaN where no two groups differ, as where the part has no token.

    With gradients g_1 .. g_n of n groups of whole prompts, whose mean is g, the noise is
    sum |g_i - g|^2 / (n (n - 1)), an unbiased estimate of the variance of g, and the signal |g|^2 - noise.
    Groups share one normalisation (the response tokens of the batch) and one set of weights, so what these
    vary by does not count as noise.

    Source: McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1; the ratio is batch size over their
    "simple" noise scale.
    """
    loss = Loss.of(student, teacher, config)
    samples = config.rollout.samples_per_prompt

    def gradient_noise(params, step, inputs: StepInputs):
        rollouts = inputs.rollouts
        _, released, loss_inputs = supervise(student, teacher, config, params, step, inputs)
        # As one of n groups, each has 1 / n of the batch's loss.
        tokens = response_tokens(rollouts) / groups
        trained, frozen = trainable.split(params, config.train.frozen)

        def measured(weights):
            weight_BT, end_weight_BT = weights
            ends = loss_inputs.ends and loss_inputs.ends.replace(weight_BT=end_weight_BT)

            def add(sums, group):
                number, mean, spread = sums
                own, _ = jax.grad(loss, has_aux=True)(trained, group, frozen, inputs.teacher_params, tokens)
                away = optax.tree.sub(own, mean)
                mean = jax.tree.map(lambda m, a: m + a / (number + 1), mean, away)
                return (number + 1, mean, spread + optax.tree.vdot(away, optax.tree.sub(own, mean))), None

            start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained), jnp.float32(0)
            pieces = cut(loss_inputs.replace(weight_BT=weight_BT, ends=ends), groups, samples)
            (_, mean, spread), _ = jax.lax.scan(add, start, pieces)
            power, noise = optax.tree.vdot(mean, mean), spread / (groups * (groups - 1))
            return jnp.sqrt(power), jnp.where(noise > 0, (power - noise) / noise, jnp.nan)

        left_BT = rollouts.mask_BT & ~released.mask_BT
        part_3BT = jnp.stack([loss_inputs.weight_BT, rollouts.mask_BT * 1.0, left_BT * 1.0])
        ends_3BT = None
        if loss_inputs.ends:  # the step teaches them at released positions too
            end_weight_BT = loss_inputs.ends.weight_BT
            ends_3BT = jnp.stack([end_weight_BT, end_weight_BT, jnp.zeros_like(end_weight_BT)])
        norm_3, snr_3 = jax.lax.map(measured, (part_3BT, ends_3BT))
        result = {}
        for part, norm, snr in zip(PARTS, norm_3, snr_3, strict=True):
            result |= {f"gradient_norm_{part}": norm, f"gradient_snr_{part}": snr}
        return result

    return gradient_noise


def cut(tree, groups: int, samples: int):
    """[B, ...] -> [groups, B / groups, ...]; the `samples` neighbouring rows of a prompt stay together."""
    prompts = jax.tree.map(lambda x: x.reshape(-1, samples, *x.shape[1:]), tree)
    return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[3:]), shard_rows.split(prompts, groups))
