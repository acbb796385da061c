"""The training loop.

    python -m opd_jax.train --config=configs/demo.py --workdir=runs/release
    python -m opd_jax.train --config=configs/demo.py --config.release.rule=none --workdir=runs/full

Started again with the same --workdir it goes on from the newest checkpoint. SIGTERM ends it after the step
that is running, with a checkpoint and exit status 75. docs/pods.md tells how to run it on a TPU pod.
"""

import contextlib
import time
from pathlib import Path

import jax
from absl import flags

from opd_jax import data
from opd_jax.config import run
from opd_jax.distill import TrainState
from opd_jax.errors import UserError
from opd_jax.evaluation import answering, evaluate
from opd_jax.parallel import distributed, sharding
from opd_jax.progress import Progress, own
from opd_jax.run import Checkpoints, Job, Key, metrics, prepare, transcripts

# What the devices do, by the names under which the loop has its clock watch them.
DOING = {"sample": "sampling", "train": "scoring and updating", "gradient_noise": "the gradient's noise"}


def due(config, every: int, step: int) -> bool:
    """Whether what happens every so many steps happens after this one; the last step is always one."""
    return every > 0 and (step % every == 0 or step == config.train.steps)


def work(config, done: int = 0) -> dict[str, int]:
    """The pieces of work of a run from step `done` on, for `Progress.plan`: name -> how many."""
    c = config
    evaluations = sum(due(c, c.eval.every, step) for step in range(done, c.train.steps + 1))
    benchmark_runs = sum(due(c, c.eval.benchmark_every, step) for step in range(done, c.train.steps + 1))
    names = [f"benchmark {number}" for number in range(len(c.eval.benchmark))]
    return {"step": c.train.steps - done, "evaluation": evaluations} | dict.fromkeys(names, benchmark_runs)


def train(
    job: Job,
    workdir,
    start_evaluation: dict | None = None,
    progress: Progress | None = None,
    *,
    start: TrainState | None = None,
    teacher_params: dict | None = None,
):
    """Trains from the start, or from the newest checkpoint in workdir, to train.steps.

    Args:
      start_evaluation: what `evaluate` returned for this run's start, where several runs share one; it
        is measured if not given.
      progress: shows what goes on; whoever gives it has planned `work` with it. Without, the run has its own.
      start: the state before the first step, read if not given; its arrays are donated.
      teacher_params: the teacher's weights, read if not given.

    Returns:
      The final TrainState.

    Raises:
      distributed.Preempted: the run was told to stop before its last step; its state is saved.
    """
    c, mesh = job.config, job.mesh
    metrics.write_run_files(workdir, c, job.prompts.counts, job.probe and job.probe.record())
    answering.write_shared(workdir, job.shared)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(own(progress))

        # ---- State: the newest checkpoint, or the start.
        checkpoints = Checkpoints(workdir, c.checkpoint.keep)
        stack.callback(_close, checkpoints, shown)
        done, position = checkpoints.latest, None
        if done is None:
            with shown.phase("reading the student's weights"):
                state = start or job.start()
        else:
            with shown.phase(f"reading the checkpoint of step {done}"):
                state, position = checkpoints.restore(done, job.abstract_state())
        if teacher_params is None:
            with shown.phase("reading the teacher's weights"):
                teacher_params = job.teacher_params()

        # ---- Prompts and draws.
        prompts = data.training_batches(
            job.prompts.train,
            job.prompt_batch,
            c.data.prompt_tokens,
            job.student.pad_id,
            c.seed,
            sharding.local_rows(mesh, job.prompt_batch),
            start=position,
            parts=job.prompts.parts,
            buckets=c.data.prompt_buckets,
        )
        key, release_key = job.key(Key.SAMPLING), job.key(Key.RELEASE)
        response_sampler = job.response_sampler()

        # ---- The loop. Metrics of a step are read after the next one is on its way.
        preemption = stack.enter_context(distributed.Preemption())
        clock = stack.enter_context(metrics.PhaseClock(_telling(shown, c.train.steps)))
        writer = stack.enter_context(metrics.MetricWriter.of(c, workdir, done, progress=shown))
        writer.say(str(job.prompts))
        # What is recorded of the step to go on from, as process 0 sees it.
        asked = [
            ("eval", None),
            *(("benchmark", rendered.benchmark.name) for rendered in job.rendered_benchmarks),
        ]
        recorded = distributed.gathered([name in writer.recorded for name in asked])[0]
        there = {name for name, found in zip(asked, recorded, strict=True) if found}
        stack.enter_context(jax.transfer_guard("disallow"))
        read = Reader(job, writer, clock)

        def evaluate_heldout(step: int, state, result: dict | None = None) -> float:
            result = dict(result or evaluate(job, state.params, teacher_params, shown))
            rows = result.pop("rows")
            writer.write_evaluations([{"step": step} | row for row in rows])
            writer.write({"kind": "eval", "step": step} | result)
            read.restart()
            return result["kl"]

        def answer_benchmarks(step: int, state, skipped=()):
            for number, rendered in enumerate(job.rendered_benchmarks):
                piece = f"benchmark {number}"
                if ("benchmark", rendered.benchmark.name) in skipped:
                    shown.skip(piece)
                    continue
                result = answering.answer(
                    rendered, response_sampler, state.params, c.eval.samples, shown, piece
                )
                answering.write(Path(workdir) / answering.FOLDER, step, result)
                del result["rows"]
                writer.write({"kind": "benchmark", "step": step} | result)
            read.restart()

        # The start; or what there was no time for after the step at which the run was stopped.
        first = done or 0
        if progress is None:
            shown.plan(work(c))
        for name, count in work(c, first).items():
            shown.skip(name, work(c)[name] - count)
        if due(c, c.eval.benchmark_every, first):
            answer_benchmarks(first, state, there)
        if due(c, c.eval.every, first):
            given = start_evaluation if done is None else None
            if given or ("eval", None) in there:
                shown.skip("evaluation")
            if ("eval", None) not in there:
                evaluate_heldout(first, state, given)
        for step in range(first + 1, c.train.steps + 1):
            started = time.perf_counter()
            local = next(prompts)
            batch = sharding.put_batch(mesh, local)
            data_seconds = time.perf_counter() - started
            width, drawn = local.tokens_BP.shape[1], (batch.tokens_BP, batch.mask_BP, key, state.step)
            sample, writes = job.sample_group, state.params
            if job.teacher_writes:
                sample, writes = job.sample_teacher, teacher_params
            with shown.compiling("the sampler", sample, width):
                rollouts = sample(writes, *drawn)
            clock.watch("sample", step, rollouts.finished_B)
            reward = ()
            if c.reward.weight:  # the host waits for the sampler here
                with shown.phase(f"step {step}/{c.train.steps}: sampling, then grading", kind="grading"):
                    reward = (job.reward(local.index_B, rollouts),)
            lesson = teacher_params, rollouts, job.segment_table(rollouts), release_key, *reward
            noise = {}
            if due(c, c.metrics.gradient_noise_every, step):
                with shown.compiling("the gradient's noise", job.gradient_noise, width):
                    noise = job.gradient_noise(state.params, state.step, *lesson)
                clock.watch("gradient_noise", step, noise["gradient_norm_all"])
            with shown.compiling("the training step", job.train_step, width):
                state, measured, supervision = job.train_step(state, *lesson)
            clock.watch("train", step, measured["loss"])
            read.finish()
            read.begin(step, measured | noise, data_seconds, batch.index_B, rollouts, supervision)
            stopping = preemption.reached()
            evaluating = due(c, c.eval.every, step) and not stopping
            examining = (
                bool(job.rendered_benchmarks) and due(c, c.eval.benchmark_every, step) and not stopping
            )
            saving = due(c, c.checkpoint.every, step) or (stopping and c.checkpoint.every > 0)
            if evaluating or examining or saving:
                read.finish()
            kl = evaluate_heldout(step, state) if evaluating else None
            if saving:
                writer.sync()
                with shown.phase(f"saving step {step}", kind="saving"):
                    checkpoints.save(step, state, prompts.state(), kl)
            if examining:  # the longest, and made when the run goes on if it ends here
                answer_benchmarks(step, state)
            if stopping:
                writer.say(f"told to stop after step {step}; start again with the same --workdir to go on")
                raise distributed.Preempted
        read.finish()
    return state


def _telling(shown: Progress, total: int):
    """What a PhaseClock is to call."""

    def told(now):
        if now is None:
            shown.device(None)
        else:
            shown.device(f"step {now[0]}/{total}: {DOING[now[1]]}", now[1])

    return told


def _close(checkpoints: Checkpoints, shown: Progress):
    with shown.phase("writing what is left of the checkpoint"):
        checkpoints.close()


class Reader:
    """Reads the metrics of the step before, while the device works on the present one."""

    def __init__(self, job: Job, writer, clock):
        self._job, self._writer, self._clock = job, writer, clock
        self._pending = None
        self.restart()

    def restart(self):
        """Starts the clock of the next step now: what came before was no training."""
        self._last = time.perf_counter()

    def begin(self, step, measured, data_seconds, index_Q, rollouts, supervision):
        """Notes what step `step` will have measured; starts no transfer of its rollouts unless shown."""
        c = self._job.config.metrics
        due = c.rollouts_every and c.rollouts and step % c.rollouts_every == 0
        shown = None
        if due or (c.rollouts_every and c.rollouts and step in (1, self._job.config.train.steps)):
            shown = sharding.first_rows(self._job.mesh, (index_Q, rollouts, supervision), c.rollouts)
        self._pending = step, measured, data_seconds, shown

    def finish(self):
        """Fetches and writes what is pending, waiting for the device only if it is not done yet."""
        if self._pending is None:
            return
        step, measured, data_seconds, shown = self._pending
        self._pending = None
        record = jax.device_get(measured)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        phases = self._clock.pop(step)
        self._writer.write(
            {"kind": "train", "step": step}
            | record
            | {
                "tokens_per_second": float(record["response_tokens"]) / seconds,
                "seconds_step": seconds,
                "seconds_data": data_seconds,
            }
            | {f"seconds_{name}": value for name, value in phases.items()}
        )
        if shown is not None and self._writer.active:
            index_Q, rollouts, supervision = jax.device_get(shown)
            right = self._job.graded(index_Q, rollouts)
            self._writer.write_rollouts(
                transcripts.records(self._job.tokenizer, step, rollouts, supervision, right)
            )


def main(_):
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is not set; give a folder for the run, such as runs/first")
    if flags.FLAGS.config is None:
        raise UserError("--config is not set; give a file of configs/, such as configs/demo.py")
    distributed.initialize()
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    with Progress() as progress:
        job = prepare(config, workdir, progress)
        progress.plan(work(config))
        train(job, workdir, progress=progress)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    run(main)
