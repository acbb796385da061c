"""A look at what a student writes and what its teacher makes of it, without learning anything."""

import jax
import numpy as np

from opd_jax import data, scoring, segments, sharding
from opd_jax import release as releasing
from opd_jax.train import RELEASE_KEY, SAMPLING_KEY
from opd_jax.train_step import Supervision
from opd_jax.transcripts import transcripts


def look(job, params: dict, teacher_params: dict) -> list[dict]:
    """The rollouts of a run's first step: same prompts, same draws, scored and cut, and no update.

    For one process. Compiles the sampler, which training shares, and scoring. With an objective whose
    responses the teacher writes, these are the student's all the same.

    Args:
      job: a Job; its release.rule decides what is kept.
      params: the student's parameters, such as `job.start().params`.

    Returns:
      rollout.batch records in the form of rollouts.jsonl, of step 0.
    """
    c, mesh = job.config, job.mesh
    first = data.batches(
        job.prompts.train,
        job.prompt_batch,
        c.data.prompt_tokens,
        job.student.pad_id,
        c.seed,
        sharding.local_rows(mesh, job.prompt_batch),
        parts=job.prompts.parts,
        buckets=c.data.prompt_buckets,
    )
    batch = sharding.put_batch(mesh, next(first))
    step = jax.device_put(np.int32(0), sharding.replicated(mesh))
    rollouts = job.sample_group(params, batch.tokens_BP, batch.mask_BP, job.key(SAMPLING_KEY), step)
    recompute = c.scoring.student == "recompute"

    def supervise(params, teacher_params, rollouts, table, key, step):
        scores = scoring.score(
            job.teacher,
            teacher_params,
            rollouts,
            chunk=c.scoring.chunk,
            micro_batches=c.rollout.batch // c.train.micro_batch,
            student=(job.student, params) if recompute else None,
        )
        segment_BT = segments.segment(table, rollouts.response_BT, rollouts.mask_BT)
        key = jax.random.fold_in(key, step)
        release = releasing.release(scores, segment_BT, rollouts.mask_BT, c.release, step=step, key=key)
        return Supervision(scores=scores.per_token(), release=release)

    supervision = jax.jit(sharding.on(mesh, supervise))(
        params, teacher_params, rollouts, job.segment_table(rollouts), job.key(RELEASE_KEY), step
    )
    return transcripts(job.tokenizer, 0, *jax.device_get((rollouts, supervision)))
