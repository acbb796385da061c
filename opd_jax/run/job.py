"""All that a run needs, checked before anything is compiled or written: mesh, models, prompts, programs."""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from opd_jax import data
from opd_jax.config import validate
from opd_jax.distill import Rollouts, TrainState, objectives
from opd_jax.errors import UserError
from opd_jax.evaluation import answering, rewards, shared_grader
from opd_jax.models import cpu, tokenizers, transformer
from opd_jax.models.files import source
from opd_jax.parallel import compile_cache, distributed, sharding
from opd_jax.progress import Progress, own
from opd_jax.release.segments import SegmentTable, nltk_segments, punkt
from opd_jax.run import metrics, programs, resolve, sizes
from opd_jax.run.draw import Draw, batching_of
from opd_jax.run.keys import Key


@dataclasses.dataclass(frozen=True)
class Job(programs.Programs):
    """The programs of a checked config, and what they read; holds no weights.

    `train_step`, `sample` and the other programs are in `programs.py`.

    Attributes:
      tokenizer: the transformers tokenizer of both models.
      prompts: training and held-out prompts.
      rendered_benchmarks: the benchmarks of eval.benchmark, rendered.
      shared: the training prompts that are evaluated on too: `answering.shared_with_training`.
      table: the SegmentTable, on the mesh; with segments.kind=nltk, the host's SentenceSplitter.
      probe: what products of auto were settled by, or None.
    """

    tokenizer: Any
    prompts: data.Prompts
    rendered_benchmarks: tuple[answering.RenderedBenchmark, ...]
    shared: list[dict[str, Any]]
    table: SegmentTable | nltk_segments.SentenceSplitter
    probe: cpu.Probe | None

    def start(self) -> TrainState:
        """The state before the first step: the student's weights in float32, pruned, sharded."""
        return start_state(self.config, self.mesh, self.optimizer, self.state_shardings)

    def teacher_params(self) -> dict:
        """The teacher's weights in its dtype or int8, sharded."""
        return source.load(
            self.config.teacher.path,
            key="teacher.path",
            mesh=self.mesh,
            shardings=self.teacher_shardings,
            dtype=self.teacher.dtype,
            stored=self.teacher.weights,
        )[1]

    def key(self, purpose: int) -> jax.Array:
        """A PRNG key of the run's seed for one purpose, on the mesh."""
        return sharding.key(self.mesh, self.config.seed, purpose)

    def training_batches(self, start: Mapping[str, Any] | None = None) -> data.TrainingBatches:
        """The training prompts by batches, from the start or from a `TrainingBatches.state()`."""
        rows = sharding.local_rows(self.mesh, self.prompt_batch)
        buckets = self.config.data.prompt_buckets
        batching = dataclasses.replace(self.batching, batch=self.prompt_batch, rows=rows, buckets=buckets)
        return data.TrainingBatches(self.prompts.train, batching, self.config.seed, start, self.prompts.parts)

    @property
    def batching(self) -> data.Batching:
        """The shape of the batches of evaluations and benchmarks."""
        return batching_of(self.config, self.mesh, self.student)

    def training_draw(self, teacher_params: dict) -> Draw:
        """Draws the responses to train on, for the parameters of the model that writes them."""
        reads = (teacher_params, self.table) if self.scores_while_sampling else ()
        return Draw(self.sample_to_train, self.key(Key.SAMPLING), self.mesh, reads=reads)

    @functools.cached_property
    def evaluation_draw(self) -> Draw:
        """Draws responses to held-out prompts, the same in every evaluation of a run."""
        return Draw(self.sample, self.key(Key.EVALUATION), self.mesh)

    @functools.cached_property
    def teacher_evaluation_draw(self) -> Draw:
        """Draws the same responses with the teacher's parameters."""
        return Draw(self.sample_as_teacher, self.key(Key.EVALUATION), self.mesh, "the teacher's sampler")

    def response_sampler(self) -> answering.ResponseSampler:
        """The student as it answers benchmarks, with its sampling settings."""
        return answering.ResponseSampler(
            draw=Draw(self.sample, self.key(Key.BENCHMARKS), self.mesh),
            batching=self.batching,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
            grader=shared_grader(),
        )

    def teacher_sampler(self) -> answering.ResponseSampler:
        """The teacher as it answers benchmarks, with the student's sampling settings."""
        draw = Draw(self.sample_as_teacher, self.key(Key.BENCHMARKS), self.mesh)
        return dataclasses.replace(self.response_sampler(), draw=draw)

    def segment_table(self, rollouts: Rollouts) -> SegmentTable:
        """The SegmentTable for these rollouts. With segments.kind=nltk, waits for them and cuts them here."""
        if isinstance(self.table, nltk_segments.SentenceSplitter):
            return self.table.cut(rollouts.tokens_BL, rollouts.mask_BT)
        return self.table

    def reward(self, index_Q, rollouts) -> jax.Array:
        """reward_B of responses to training prompts, graded on the host; waits for the sampler.

        Args:
          index_Q: the numbers of this process's prompts.
          rollouts: Rollouts on the mesh.
        """
        answers = self._answers(index_Q)
        return rewards.reward_batch(self.mesh, self.tokenizer, shared_grader(), answers, rollouts)

    def graded(self, index_Q, rollouts) -> list[bool | None] | None:
        """Whether responses to training prompts are right, None for one without a reference answer.

        Args:
          index_Q: the numbers of their prompts.
          rollouts: Rollouts on the host.

        Returns:
          One entry a rollout; None where no prompt has an answer.
        """
        answers = self._answers(index_Q)[: len(rollouts.mask_BT)]
        if all(answer is None for answer in answers):
            return None
        return rewards.graded(self.tokenizer, shared_grader(), answers, rollouts.tokens_BL, rollouts.mask_BT)

    def _answers(self, index_Q) -> list[str | None]:
        index_B = np.repeat(index_Q, self.config.rollout.samples_per_prompt)
        return [self.prompts.train[index].answer for index in index_B]


def prepare(config, workdir=None, progress: Progress | None = None) -> Job:
    """Checks a config against the machine, the models, the tokenizers and the prompts.

    Args:
      config: a config as docs/configs.md describes it; completed in place.
      workdir: also check that a run may be written there.
      progress: shows what is read.

    Returns:
      The Job. Nothing has been compiled, and nothing written but prepared prompts.

    Raises:
      UserError: the first thing that is wrong.
    """
    with own(progress) as shown:
        return _prepare(config, workdir, shown)


def _prepare(config, workdir, shown: Progress) -> Job:
    validate(config)
    if workdir is not None:
        check_workdir(workdir, config)
    compile_cache.enable(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh)
    probe = resolve.settle_products(config, mesh, workdir)
    student, teacher = resolve.models(config, mesh)
    with shown.phase("reading the tokenizers"):
        tokenizer = tokenizers.load(config.student.path, "student.path")
        teachers = tokenizers.load(config.teacher.path, "teacher.path")
    options = tokenizers.template_options(config.data.template, tokenizer)
    tokenizers.check_pair(tokenizer, teachers, options)
    swapped_ids = tokenizers.swapped_end_ids(tokenizer, teachers, config.teacher.end_id)
    teacher = teacher.replace(swapped_ids=swapped_ids)
    chosen = config.rollout.end_ids
    ends = tokenizers.end_ids(tokenizer, student, chosen)
    if not chosen:
        tokenizers.check_ends(ends, tokenizers.end_ids(teachers, teacher, key="teacher.path"), swapped_ids)
    valid = min(student.valid_vocab, teacher.valid_vocab)
    student, teacher = (m.replace(eos_ids=ends, valid_vocab=valid) for m in (student, teacher))
    sizes.check(config, mesh, student, teacher)
    with shown.phase("reading the prompts"):
        prompts = data.load(config.data, tokenizer)
    if config.reward.weight and all(prompt.answer is None for prompt in prompts.train):
        raise UserError(
            f"reward.weight={config.reward.weight} needs reference answers, and no training prompt has an "
            "`answer`; add that field to the data of data.path, or set reward.weight=0"
        )
    unanswered = prompts.counts["unanswered"]
    if config.reward.weight and unanswered:
        logging.warning("%d training prompts have no answer, and their responses no reward", unanswered)
    with shown.phase("reading the benchmarks"):
        rendered_benchmarks = answering.prepare(
            config.eval.benchmark, tokenizer, config.data, heldout=prompts.heldout
        )
        shared = answering.shared_with_training(prompts, rendered_benchmarks)
    check_same_everywhere(
        {"data.path": prompts.train + prompts.heldout}
        | {f"eval.benchmark={r.benchmark.name}": r.prompts for r in rendered_benchmarks}
    )
    if shared:
        logging.warning("%s", answering.say_shared(shared))
    with shown.phase("reading the vocabulary's sentence ends"):
        table = _segment_table(config.segments, tokenizer, mesh)
    return Job.of(
        config,
        mesh,
        student,
        teacher,
        tokenizer=tokenizer,
        prompts=prompts,
        rendered_benchmarks=rendered_benchmarks,
        shared=shared,
        table=table,
        probe=probe,
    )


def check_same_everywhere(lists: Mapping[str, Sequence[data.Prompt]]) -> None:
    """Refuses prompts that are not the same in all processes. Call it in every process.

    Args:
      lists: prompts by the key that names them.

    Raises:
      UserError: names the key.
    """
    digests = [list(bytes.fromhex(data.digest(prompts))) for prompts in lists.values()]
    found = distributed.gathered(np.array(digests, np.uint8))
    for key, read in zip(lists, found.swapaxes(0, 1), strict=True):
        different = np.nonzero((read != read[0]).any(axis=1))[0]
        if len(different):
            raise UserError(
                f"{key}: processes {', '.join(map(str, different))} read other prompts than process 0; give"
                " all hosts the same files and package versions"
            )


def start_state(config, mesh, optimizer, shardings: TrainState) -> TrainState:
    """The state before the first step: the student's weights in float32, pruned, sharded."""
    path, drop = config.student.path, config.student.drop_layers
    whole, params = source.load(
        path,
        key="student.path",
        mesh=mesh,
        shardings=programs.param_shardings(
            mesh, source.config(path, "student.path").replace(layout=resolve.layout(config, "student"))
        ),
        dtype=jnp.float32,
    )
    if drop:
        _, params = transformer.prune(whole, params, drop)
    params = jax.device_put(params, shardings.params)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, init(params))


def check_workdir(workdir, config):
    """Refuses a workdir that can't be written or holds another run, and a config that can't train.

    Raises:
      UserError: names the folder, or the key, and the remedy.
    """
    objective = objectives.OBJECTIVES[config.objective.name]
    if config.rollout.temperature == 0 and objective.advantage:
        raise UserError(
            f"rollout.temperature=0 draws nothing, and objective.name={config.objective.name} learns from"
            " draws; set it to 1, or use an objective without A, such as reverse_kl"
        )
    if config.metrics.wandb:
        metrics.check_wandb()
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
        raise conflict


def _segment_table(config, tokenizer, mesh):
    if config.kind == "nltk":
        parameters = punkt.load_parameters(config.punkt)
        return nltk_segments.SentenceSplitter(tokenizers.token_bytes(tokenizer), parameters)
    table = SegmentTable.from_tokenizer(tokenizer, config.kind, config.punkt)
    return jax.device_put(table, sharding.replicated(mesh))
