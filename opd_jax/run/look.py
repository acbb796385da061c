"""A look at what a student writes and what its teacher makes of it, without learning anything."""

import copy
import dataclasses
import math

import jax
import numpy as np

from opd_jax.distill import StepInputs, Supervision, train_step
from opd_jax.models.files import source
from opd_jax.parallel import sharding
from opd_jax.progress import Progress, own
from opd_jax.run import transcripts
from opd_jax.run.draw import Draw
from opd_jax.run.job import Job, prepare
from opd_jax.run.keys import Key

# Asks for an answer of several hundred tokens, in sentences; REQUEST_TOKENS is room for it in a prompt.
AT_LENGTH = "Think it through at length, and explain every step in full sentences."
REQUEST_TOKENS = 96


def preview(job, params: dict, teacher_params: dict, progress: Progress | None = None) -> list[dict]:
    """The rollouts of a run's first step: same prompts, same draws, scored and cut, and no update.

    For one process. Compiles the sampler, which training shares, and scoring. With an objective whose
    responses the teacher writes, these are the student's all the same.

    Args:
      job: a Job; its release.rule decides what is kept.
      params: the student's parameters, such as `job.start().params`.
      progress: shows what goes on; the look has its own if not given.

    Returns:
      rollout.batch records in the form of rollouts.jsonl, of step 0.
    """
    with own(progress) as shown:
        return _preview(job, params, teacher_params, shown)


def _preview(job, params: dict, teacher_params: dict, shown: Progress) -> list[dict]:
    draw = Draw(job.sample_group, job.key(Key.SAMPLING), job.mesh)
    step = jax.device_put(np.int32(0), sharding.replicated(job.mesh))
    _, rollouts = draw(params, next(job.training_batches()), step, shown)

    def supervise(params, step, inputs: StepInputs):
        scores, release, _ = train_step.supervise(job.student, job.teacher, job.config, params, step, inputs)
        return Supervision(scores=scores.per_token(), release=release)

    with shown.phase("compiling what scores, while the student writes"):
        table, key = job.segment_table(rollouts), job.key(Key.RELEASE)
        inputs = StepInputs(teacher_params, rollouts, table, key)
        supervision = jax.jit(sharding.on(job.mesh, supervise))(params, step, inputs)
    with shown.phase("sampling and scoring"):
        rollouts, supervision = jax.device_get((rollouts, supervision))
    return transcripts.records(job.tokenizer, 0, rollouts, supervision)


def long_job(config, answers: int, answer_tokens: int, progress: Progress | None = None) -> Job:
    """The job of a run whose `look` shows long answers: the same models, asked for answers at length.

    Open questions are asked, prompts without a reference answer; where every prompt has one, all.

    Args:
      config: of a run, validated; the rule that cuts is the paper's.
      answers: rollouts; more where they are fewer than the devices that each take some.
      answer_tokens: the longest answer; less if the models have no room for it after a prompt.
    """
    c = copy.deepcopy(config)
    devices = sharding.pieces(sharding.make_mesh(c.mesh))
    answers = -(-answers // devices) * devices
    c.release.rule = "paper"
    c.objective.name = "policy_gradient"  # scores without what an objective needs besides
    c.data.instruction = AT_LENGTH
    c.data.over_long = "drop"
    c.data.prompt_tokens += REQUEST_TOKENS
    c.data.heldout = 0
    c.rollout.batch, c.rollout.samples_per_prompt = answers, 1
    paths = {f"{name}.path": c[name].path for name in ("student", "teacher")}
    positions = min(source.config(path, key).max_positions for key, path in paths.items())
    c.rollout.max_tokens = min(answer_tokens, positions - c.data.prompt_tokens)
    c.train.micro_batch = math.lcm(devices, math.gcd(answers, 4))
    c.metrics.gradient_noise_every = 0
    c.eval.every = 0
    c.eval.benchmark = ()
    job = prepare(c, progress=progress)
    asked = [p for p in job.prompts.train if p.answer is None] or job.prompts.train
    c.data.prompt_tokens = max(len(prompt.ids) for prompt in asked)
    return dataclasses.replace(
        job, prompts=dataclasses.replace(job.prompts, train=asked, parts=((len(asked), 1.0),))
    )
