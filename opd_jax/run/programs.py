"""The compiled programs of a run: what they are made of, their shardings, and their arguments' shapes.

Nothing here reads weights, prompts or tokenizers, so the same programs are built for devices that are not
attached: every argument is also there as shapes, dtypes and shardings alone (the `abstract_` methods).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from opd_jax.distill import (
    Rollouts,
    StepInputs,
    TrainState,
    gradient_noise,
    make_optimizer,
    make_train_step,
    objectives,
    repeats,
    rollout,
    scoring,
    stopping,
    trainable,
)
from opd_jax.models import ModelConfig, transformer
from opd_jax.parallel import sharding
from opd_jax.release.segments import SegmentTable

# Sections of the config that the training step reads; a run's seed and data are arguments of it.
TRAIN_STEP_READS = (
    "objective",
    "optimizer",
    "release",
    "reward",
    "rollout",
    "scoring",
    "segments",
    "train",
)
SAMPLER_READS = ("data", *TRAIN_STEP_READS)  # of a sampler that scores


def compiled(sections: Sequence[str]) -> Callable[[Callable[..., Any]], functools.cached_property[Any]]:
    """A compiled program as an attribute of `Programs`.

    Jobs of one process share it where their models, their mesh and these sections of their configs agree. The
    decorated method sees Programs with these sections of the config alone.
    """

    def attribute(build: Callable[["Programs"], Any]) -> functools.cached_property[Any]:
        @functools.lru_cache(maxsize=8)
        def shared(mesh, student: ModelConfig, teacher: ModelConfig, config: FrozenConfigDict):
            return build(Programs.of(config, mesh, student, teacher))

        @functools.wraps(build)
        def program(self):
            read = FrozenConfigDict({name: self.config[name].to_dict() for name in sections})
            return shared(self.mesh, self.student, self.teacher, read)

        return functools.cached_property(program)

    return attribute


@dataclasses.dataclass(frozen=True)
class Programs:
    """A checked config and the programs that follow from it; build it with `of`.

    Attributes:
      config: the resolved config.
      mesh: the devices.
      student, teacher: the models; the student as it is trained, pruned.
      optimizer: the optax transformation.
      state_shardings, teacher_shardings: where each array lives.
    """

    config: Any
    mesh: jax.sharding.Mesh
    student: ModelConfig
    teacher: ModelConfig
    optimizer: optax.GradientTransformation
    state_shardings: TrainState
    teacher_shardings: dict

    @classmethod
    def of(cls, config, mesh, student: ModelConfig, teacher: ModelConfig, **more):
        """The programs of a validated config for two models on a mesh; `more` is a subclass's own."""
        optimizer = make_optimizer(config)
        return cls(
            config=config,
            mesh=mesh,
            student=student,
            teacher=teacher,
            optimizer=optimizer,
            state_shardings=state_shardings(config, mesh, student, optimizer),
            teacher_shardings=param_shardings(mesh, teacher),
            **more,
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return placed(abstract_state(self.student, self.optimizer), self.state_shardings)

    def abstract_teacher(self) -> dict:
        """Shapes, dtypes and shardings of the teacher's parameters, in its dtype or int8."""
        return placed(transformer.abstract(self.teacher, self.teacher.dtype), self.teacher_shardings)

    def abstract_draw(self, prompts: int) -> tuple:
        """Abstract (tokens_QP, mask_QP, key, step): a sampler's arguments after the parameters, Q prompts."""
        shape = prompts, self.config.data.prompt_tokens
        rows, whole = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        return (
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
            jax.ShapeDtypeStruct(shape, bool, sharding=rows),
            self.abstract_key(),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        )

    def abstract_training_draw(self) -> tuple:
        """The abstract arguments of `sample_to_train`."""
        params = self.abstract_teacher() if self.teacher_writes else self.abstract_state().params
        reads = (self.abstract_teacher(), self.abstract_table()) if self.scores_while_sampling else ()
        return params, *self.abstract_draw(self.prompt_batch), *reads

    def abstract_key(self):
        """An abstract PRNG key."""
        return placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(self.mesh))

    def abstract_table(self) -> SegmentTable:
        """An abstract SegmentTable: a row for each token id; with segments.kind=nltk, that of a batch."""
        c = self.config
        if c.segments.kind == "nltk":
            number_BT = jax.ShapeDtypeStruct((c.rollout.batch, c.rollout.max_tokens), jnp.int32)
            return placed(SegmentTable(number_BT, "nltk"), sharding.batch(self.mesh))
        text = [b""] * self.student.valid_vocab
        table = SegmentTable.from_token_bytes(text, c.segments.kind, c.segments.punkt)
        return placed(table, sharding.replicated(self.mesh))

    def abstract_rollouts(self) -> Rollouts:
        """The abstract Rollouts that `sample_to_train` returns."""
        like = jax.eval_shape(self.sample_to_train, *self.abstract_training_draw())
        return placed(like, sharding.batch(self.mesh))

    def abstract_inputs(self) -> StepInputs:
        """The abstract second argument of `train_step`."""
        reward_B = None
        if self.config.reward.weight:
            batch = (self.config.rollout.batch,)
            reward_B = jax.ShapeDtypeStruct(batch, jnp.float32, sharding=sharding.batch(self.mesh))
        return StepInputs(
            teacher_params=self.abstract_teacher(),
            rollouts=self.abstract_rollouts(),
            table=self.abstract_table(),
            key=self.abstract_key(),
            reward_B=reward_B,
        )

    @property
    def input_shardings(self) -> StepInputs:
        """Where the arrays of StepInputs live; one sharding for each of its parts."""
        rows: Any = sharding.batch(self.mesh)  # of every array of a part
        whole: Any = sharding.replicated(self.mesh)
        return StepInputs(
            teacher_params=self.teacher_shardings,
            rollouts=rows,
            table=rows if self.config.segments.kind == "nltk" else whole,
            key=whole,
            reward_B=rows if self.config.reward.weight else None,
        )

    @property
    def teacher_writes(self) -> bool:
        """Whether the responses to train on are the teacher's."""
        return objectives.OBJECTIVES[self.config.objective.name].writer == "teacher"

    @property
    def scores_while_sampling(self) -> bool:
        """Whether the sampler of the responses to train on scores them too, and stops them by the rule."""
        return self.config.release.stop == "rule"

    @property
    def prompt_batch(self) -> int:
        """Q, prompts a training step."""
        return self.config.rollout.batch // self.config.rollout.samples_per_prompt

    @property
    def sample(self):
        """Compiled sample(params, tokens_BP, mask_BP, key, step) -> Rollouts, one response a prompt.

        Draws from (key, step).
        """
        return sample_program(self.mesh, self.student, sampling(self.config))

    @property
    def sample_group(self):
        """Compiled like `sample`, with rollout.samples_per_prompt responses a prompt: those to train on."""
        samples = self.config.rollout.samples_per_prompt
        return sample_program(self.mesh, self.student, sampling(self.config, samples))

    @property
    def sample_as_teacher(self):
        """Compiled like `sample`, for the teacher's parameters."""
        return sample_program(self.mesh, self.teacher, sampling(self.config))

    @property
    def sample_teacher(self):
        """Compiled like `sample_group`, for the teacher's parameters; the Rollouts hold its probabilities."""
        samples = self.config.rollout.samples_per_prompt
        return sample_program(self.mesh, self.teacher, sampling(self.config, samples))

    @property
    def sample_to_train(self):
        """The sampler of the responses to train on, `sample_group` as the objective and release.stop want it.

        Compiled like `sample`, for the parameters of the model that writes. With `scores_while_sampling`, it
        takes the teacher's parameters and the SegmentTable after the others.
        """
        if self.scores_while_sampling:
            return self.sample_and_score
        c = self.config
        stop = stopping.parse(c.release.stop, c.release.stop_audit)
        if not isinstance(stop, stopping.Limit):
            return self.sample_teacher if self.teacher_writes else self.sample_group
        writer = self.teacher if self.teacher_writes else self.student
        return sample_program(self.mesh, writer, sampling(c, c.rollout.samples_per_prompt), stop)

    @compiled(SAMPLER_READS)
    def sample_and_score(self):
        """Compiled like `sample_group`, with (teacher_params, table) as last arguments."""
        c = self.config
        how = sampling(c, c.rollout.samples_per_prompt)
        keep = objectives.OBJECTIVES[c.objective.name].teacher
        scored = scoring.Scoring(c.scoring.chunk, keep=keep, top_k=c.objective.top_k)
        block = min(c.release.stop_block, c.rollout.max_tokens)

        def sample(params, tokens_QP, mask_QP, key, step, *reads):
            teacher_params, table = reads
            judge = stopping.Judge(self.teacher, teacher_params, table, c.release, scored, step, block)
            key, prompts = jax.random.fold_in(key, step), (tokens_QP, mask_QP)
            return stopping.sample_and_score((self.student, params), prompts, key, how, judge)

        rows, whole = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        models = param_shardings(self.mesh, self.student), self.teacher_shardings
        return jax.jit(
            sharding.on(self.mesh, sample),
            in_shardings=(models[0], rows, rows, whole, whole, models[1], whole),
            out_shardings=rows,
        )

    @compiled(TRAIN_STEP_READS)
    def train_step(self):
        """Compiled train_step(state, StepInputs) -> (state, metrics, Supervision); the state is donated."""
        step = make_train_step(self.student, self.teacher, self.config, self.optimizer)
        rows, whole = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        return jax.jit(
            sharding.on(self.mesh, step),
            in_shardings=(self.state_shardings, self.input_shardings),
            out_shardings=(self.state_shardings, whole, rows),
            donate_argnums=0,
        )

    @compiled(TRAIN_STEP_READS)
    def gradient_noise(self):
        """Compiled gradient_noise(params, step, StepInputs) -> scalars."""
        groups = gradient_noise.group_count(self.config, self.mesh)
        assert groups is not None, "sizes.check refuses a batch without two groups"
        noise = gradient_noise.make_gradient_noise(self.student, self.teacher, self.config, groups)
        whole = sharding.replicated(self.mesh)
        return jax.jit(
            sharding.on(self.mesh, noise),
            in_shardings=(self.state_shardings.params, whole, self.input_shardings),
            out_shardings=whole,
        )

    @property
    def divergence(self):
        """Compiled divergence(params, teacher_params, rollouts) -> per rollout sums, on every host.

        Returns a dict of [B] arrays: kl_B (nats, summed over the response), tokens_B, finished_B,
        repeated_B (`repeats.repeated_tail`).
        """
        c = self.config
        return _divergence_program(
            self.mesh, self.student, self.teacher, c.train.micro_batch, (c.scoring.chunk, c.train.pack)
        )


def sampling(config, samples: int = 1) -> rollout.Sampling:
    """The Sampling of a config, with `samples` responses a prompt."""
    r, p = config.rollout, config.data.prompt_tokens
    micro_batch = config.train.micro_batch or r.batch
    return rollout.Sampling(
        max_tokens=r.max_tokens,
        samples=samples,
        candidates=config.scoring.candidates,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        int8_cache=r.cache_dtype == "int8",
        halvings=r.halvings,
        slots=r.slots,
        prefill_rows=micro_batch * (p + r.max_tokens) // p,  # as many tokens as a micro-batch of training
        prompt_shares=tuple(r.prompt_widths),
    )


# Jobs of one process share what is compiled for them where they agree in what it reads.
@functools.lru_cache(maxsize=8)
def sample_program(mesh, model: ModelConfig, sampling: rollout.Sampling, limit: stopping.Limit | None = None):
    """The jitted sampler of `Programs.sample`, for any model; with lengths at which rows stop, if given."""

    def sample(params, tokens_QP, mask_QP, key, step):
        key = jax.random.fold_in(key, step)
        if limit is None:
            return rollout.sample(model, params, tokens_QP, mask_QP, key, sampling)
        draws = limit.draws(rollout.draws(key, len(tokens_QP), sampling), sampling, step)
        rollouts = rollout.sample(model, params, tokens_QP, mask_QP, draws, sampling)
        return limit.noted(rollouts, draws, sampling)

    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    return jax.jit(
        sharding.on(mesh, sample),
        in_shardings=(param_shardings(mesh, model), rows, rows, whole, whole),
        out_shardings=rows,
    )


@functools.lru_cache(maxsize=8)
def _divergence_program(mesh, student: ModelConfig, teacher: ModelConfig, micro_batch: int, sizes):
    chunk, pack = sizes

    def divergence(params, teacher_params, rollouts):
        how = scoring.Scoring(chunk, len(rollouts.mask_BT) // micro_batch, pack=pack)
        kl_BT, teacher_logp_BT = scoring.distance(student, params, teacher, teacher_params, rollouts, how)
        return {
            "kl_B": kl_BT.sum(axis=1),
            "teacher_logp_B": teacher_logp_BT.sum(axis=1),
            "tokens_B": rollouts.mask_BT.sum(axis=1),
            "finished_B": rollouts.finished_B,
            "repeated_B": repeats.repeated_tail(rollouts.response_BT, rollouts.mask_BT, rollouts.finished_B),
        }

    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    return jax.jit(
        sharding.on(mesh, divergence),
        in_shardings=(param_shardings(mesh, student), param_shardings(mesh, teacher), rows),
        out_shardings=whole,
    )


def state_shardings(config, mesh, model: ModelConfig, optimizer) -> TrainState:
    """Shardings of the training state of a model; reads train.frozen and optimizer.memory."""
    params = param_shardings(mesh, model)
    trained, _ = trainable.split(params, config.train.frozen)
    opt_state = abstract_state(model, optimizer).opt_state
    return TrainState(
        step=sharding.replicated(mesh),
        params=params,
        opt_state=sharding.like_params(mesh, opt_state, trained, config.optimizer.memory),
    )


def param_shardings(mesh, model: ModelConfig) -> dict:
    """The sharding of each parameter of a model."""
    axes = transformer.logical_axes(model)
    return sharding.param_shardings(mesh, transformer.abstract(model), axes, model.layout.rules)


def abstract_state(student: ModelConfig, optimizer) -> TrainState:
    """Shapes and dtypes of a state."""
    params = transformer.abstract(student)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )


def placed(abstract, shardings):
    """The abstract arrays with shardings: a tree of them, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings), abstract)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
