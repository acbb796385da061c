"""The optimizer of the student: AdamW, its schedule, and moments in the hosts' memory."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax.distill import trainable


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


def from_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer with its moments in the hosts' memory: each update fetches them and returns them.

    Its update takes the argument `finite`, a scalar; False skips the update, and nothing is fetched. This
    branch also keeps a compiler from fetching the moments early to hide the copies. They would then be in
    memory with the activations after all.
    """

    def update(updates, state, params=None, *, finite: Any = True, **_):
        lies = jax.tree.map(lambda x: jax.typeof(x).memory_space, state)

        def fetched(grads, state, params):
            state = jax.device_put(state, jax.memory.Space.Device)
            changes, state = optimizer.update(grads, state, params)
            return changes, jax.tree.map(jax.device_put, state, lies)

        def unchanged(grads, state, params):
            return jax.tree.map(jnp.zeros_like, grads), state

        return jax.lax.cond(finite, fetched, unchanged, updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def learning_rate(config) -> optax.Schedule:
    """Learning rate by update number, as optimizer.* says."""
    o = config.optimizer
    total = (o.decay_steps or config.train.steps) * config.train.updates_per_rollout
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
