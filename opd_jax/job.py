"""All that a run needs, checked before anything is compiled or written: mesh, models, prompts, programs."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from opd_jax import (
    benchmark_run,
    data,
    metrics,
    objectives,
    rewards,
    rollout,
    scoring,
    segments,
    sharding,
    tokenizers,
)
from opd_jax import train_step as steps
from opd_jax.config import validate
from opd_jax.errors import UserError
from opd_jax.grading import Grader
from opd_jax.models import source, transformer
from opd_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked config and what follows from it; holds no weights.

    Attributes:
      config: the resolved config.
      mesh: the devices.
      student, teacher: the models; the student as it is trained, pruned.
      tokenizer: the transformers tokenizer of both.
      prompts: training and held-out prompts.
      exams: the benchmarks of eval.benchmark, rendered.
      table: the SegmentTable, on the mesh.
      optimizer: the optax transformation.
      state_shardings, teacher_shardings: where each array lives.
    """

    config: Any
    mesh: jax.sharding.Mesh
    student: ModelConfig
    teacher: ModelConfig
    tokenizer: Any
    prompts: data.Prompts
    exams: tuple[benchmark_run.Exam, ...]
    table: segments.SegmentTable
    optimizer: optax.GradientTransformation
    state_shardings: steps.TrainState
    teacher_shardings: dict

    def start(self) -> steps.TrainState:
        """The state before the first step: the student's weights in float32, pruned, sharded."""
        path, drop = self.config.student.path, self.config.student.drop_layers
        whole, params = source.load(
            path,
            key="student.path",
            mesh=self.mesh,
            shardings=_param_shardings(self.mesh, source.config(path, "student.path")),
            dtype=jnp.float32,
        )
        if drop:
            _, params = transformer.prune(whole, params, drop)
        params = jax.device_put(params, self.state_shardings.params)
        init = jax.jit(self.optimizer.init, out_shardings=self.state_shardings.opt_state)
        step = jax.device_put(jnp.int32(0), self.state_shardings.step)
        return steps.TrainState(step=step, params=params, opt_state=init(params))

    def abstract_state(self) -> steps.TrainState:
        """Shapes, dtypes and shardings of the state, to restore into."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            _abstract_state(self.student, self.optimizer),
            self.state_shardings,
        )

    def teacher_params(self) -> dict:
        """The teacher's weights in its dtype, sharded."""
        return source.load(
            self.config.teacher.path,
            key="teacher.path",
            mesh=self.mesh,
            shardings=self.teacher_shardings,
            dtype=self.teacher.dtype,
        )[1]

    def key(self, purpose: int) -> jax.Array:
        """A PRNG key of the run's seed for one purpose, on the mesh."""
        with jax.transfer_guard("allow"):  # a seed is a host number
            key = jax.random.fold_in(jax.random.key(self.config.seed), purpose)
            return jax.device_put(key, sharding.replicated(self.mesh))

    @property
    def teacher_writes(self) -> bool:
        """Whether the responses to train on are the teacher's."""
        return objectives.OBJECTIVES[self.config.objective.name].writer == "teacher"

    @property
    def sample(self):
        """Compiled sample(params, tokens_BP, mask_BP, key, step) -> Rollouts; draws from (key, step)."""
        return sample_program(self.mesh, self.student, sampling(self.config))

    @property
    def sample_teacher(self):
        """As `sample`, of the teacher's parameters: its Rollouts hold the teacher's probabilities."""
        return sample_program(self.mesh, self.teacher, sampling(self.config))

    def responder(self, key: jax.Array) -> benchmark_run.Responder:
        """The student as it answers benchmarks: with the program that samples its rollouts."""
        c = self.config
        return benchmark_run.Responder(
            sample=self.sample,
            batch=c.rollout.batch,
            prompt_tokens=c.data.prompt_tokens,
            pad_id=self.student.pad_id,
            key=key,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
            grader=self.grader,
        )

    @functools.cached_property
    def train_step(self):
        """Compiled train_step(state, teacher_params, rollouts, table, key); the state is donated.

        With a reward.weight it takes one argument more, what `reward` returns.
        """
        step = steps.make_train_step(self.student, self.teacher, self.config, self.optimizer)
        rows, whole = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        reward = (rows,) if self.config.reward.weight else ()
        return jax.jit(
            step,
            in_shardings=(self.state_shardings, self.teacher_shardings, rows, whole, whole, *reward),
            out_shardings=(self.state_shardings, whole, rows),
            donate_argnums=0,
        )

    def reward(self, index_B, rollouts) -> jax.Array:
        """reward_B of responses to training prompts, graded on the host; waits for the sampler.

        Args:
          index_B: the numbers of this process's prompts.
          rollouts: Rollouts on the mesh.
        """
        answers = [self.prompts.train[index].answer for index in index_B]
        return rewards.reward_batch(self.mesh, self.tokenizer, self.grader, answers, rollouts)

    @functools.cached_property
    def grader(self) -> Grader:
        """What grades answers; its processes start at the first use and end with this job."""
        return Grader()

    @property
    def divergence(self):
        """Compiled divergence(params, teacher_params, rollouts) -> per rollout sums, on every host.

        Returns a dict of [B] arrays: kl_B (nats, summed over the response), tokens_B, finished_B.
        """
        return _divergence_program(self.mesh, self.student, self.teacher, self.config.scoring.chunk)


def sampling(config) -> rollout.Sampling:
    """How a config samples."""
    c = config
    return rollout.Sampling(
        max_tokens=c.rollout.max_tokens,
        candidates=c.scoring.candidates,
        temperature=c.rollout.temperature,
        top_k=c.rollout.top_k,
        top_p=c.rollout.top_p,
        cache_stages=c.rollout.cache_stages,
    )


# Jobs of one process that differ in their training alone share what is compiled for the rest.
@functools.lru_cache(maxsize=8)
def sample_program(mesh, student: ModelConfig, sampling: rollout.Sampling):
    def sample(params, tokens_BP, mask_BP, key, step):
        key = jax.random.fold_in(key, step)
        return rollout.sample(student, params, tokens_BP, mask_BP, key, sampling)

    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    return jax.jit(
        sample,
        in_shardings=(_param_shardings(mesh, student), rows, rows, whole, whole),
        out_shardings=rows,
    )


@functools.lru_cache(maxsize=8)
def _divergence_program(mesh, student: ModelConfig, teacher: ModelConfig, chunk: int):
    def divergence(params, teacher_params, rollouts):
        kl_BT = scoring.reverse_kl(student, params, teacher, teacher_params, rollouts, chunk=chunk)
        return {
            "kl_B": kl_BT.sum(axis=1),
            "tokens_B": rollouts.mask_BT.sum(axis=1),
            "finished_B": rollouts.finished_B,
        }

    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    return jax.jit(
        divergence,
        in_shardings=(_param_shardings(mesh, student), _param_shardings(mesh, teacher), rows),
        out_shardings=whole,
    )


def prepare(config, workdir=None) -> Job:
    """Checks a config against the machine, the models, the tokenizers and the prompts.

    Args:
      config: a config as configs/default.py describes it; completed in place.
      workdir: also check that a run may be written there.

    Returns:
      The Job. Nothing has been compiled, and nothing written but prepared prompts.

    Raises:
      UserError: the first thing that is wrong.
    """
    validate(config)
    if workdir is not None:
        check_workdir(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, "train.micro_batch", config.train.micro_batch)
    student = _model(config, "student.path", config.student.compute_dtype)
    teacher = _model(config, "teacher.path", config.teacher.dtype)
    drop = config.student.drop_layers
    if drop and not (set(drop) < set(range(student.layers))):
        raise UserError(
            f"student.drop_layers={tuple(drop)} does not fit a model of {student.layers} layers; "
            f"give indices from 0 to {student.layers - 1}, and keep at least one"
        )
    student = student.replace(layers=student.layers - len(set(drop)))

    tokenizer = tokenizers.load(config.student.path, "student.path")
    tokenizers.check_pair(tokenizer, tokenizers.load(config.teacher.path, "teacher.path"))
    ends = tokenizers.end_ids(tokenizer, student)
    valid = min(student.valid_vocab, teacher.valid_vocab)
    student, teacher = (m.replace(eos_ids=ends, valid_vocab=valid) for m in (student, teacher))
    length = config.data.prompt_tokens + config.rollout.max_tokens
    for key, model in (("student.path", student), ("teacher.path", teacher)):
        if length > model.max_positions:
            raise UserError(
                f"data.prompt_tokens + rollout.max_tokens = {length} is more than the "
                f"{model.max_positions} positions of {key}; lower one of them"
            )
    if config.scoring.candidates > valid:
        raise UserError(f"scoring.candidates={config.scoring.candidates} exceeds {valid} token ids")
    if config.objective.top_k >= valid:
        raise UserError(f"objective.top_k={config.objective.top_k} must be below the {valid} token ids")

    optimizer = steps.make_optimizer(config)
    params = _param_shardings(mesh, student)
    opt_state = _abstract_state(student, optimizer).opt_state
    prompts = data.load(config.data, tokenizer)
    if config.reward.weight and all(prompt.answer is None for prompt in prompts.train):
        raise UserError(
            f"reward.weight={config.reward.weight} needs reference answers, and no training prompt has an "
            "`answer`; add that field to the data of data.path, or set reward.weight=0"
        )
    table = segments.SegmentTable.from_tokenizer(tokenizer, config.segments.kind)
    exams = tuple(benchmark_run.prepare(spec, tokenizer, config.data) for spec in config.eval.benchmark)
    if shared := benchmark_run.shared_with_training(prompts, exams):
        logging.warning("%s", shared)
    return Job(
        config=config,
        mesh=mesh,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        prompts=prompts,
        exams=exams,
        table=jax.device_put(table, sharding.replicated(mesh)),
        optimizer=optimizer,
        state_shardings=steps.TrainState(
            step=sharding.replicated(mesh),
            params=params,
            opt_state=sharding.like_params(mesh, opt_state, params),
        ),
        teacher_shardings=_param_shardings(mesh, teacher),
    )


def check_workdir(workdir, config):
    """Refuses a workdir that cannot be written or holds a run of another config.

    Raises:
      UserError: names the folder and the remedy.
    """
    try:
        above = (Path(workdir), *Path(workdir).absolute().parents)
        with tempfile.TemporaryFile(dir=next(path for path in above if path.exists())):
            pass
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder"
        ) from error
    conflict = metrics.config_conflict(workdir, config)
    if conflict:
        raise UserError(conflict)


def _model(config, key: str, dtype: str) -> ModelConfig:
    path = config[key.split(".")[0]].path
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return source.config(path, key).replace(compute_dtype=dtype)


def _param_shardings(mesh, model: ModelConfig):
    return sharding.param_shardings(
        mesh, transformer.abstract(model), transformer.logical_axes(model)
    )


def _abstract_state(student: ModelConfig, optimizer) -> steps.TrainState:
    params = transformer.abstract(student)
    return steps.TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
