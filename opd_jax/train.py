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

from opd_jax import benchmark_run, data, distributed, metrics, sharding
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.evaluate import evaluate
from opd_jax.job import Job, prepare
from opd_jax.train_step import TrainState
from opd_jax.transcripts import transcripts

SAMPLING_KEY, RELEASE_KEY = 0, 2  # evaluations use 1, benchmarks 3


def train(
    job: Job,
    workdir,
    start_evaluation: dict | None = None,
    *,
    start: TrainState | None = None,
    teacher_params: dict | None = None,
):
    """Trains from the start, or from the newest checkpoint in workdir, to train.steps.

    Args:
      start_evaluation: what `evaluate` returned for this run's start, where several runs share one; it
        is measured if not given.
      start: the state before the first step, read if not given; its arrays are donated.
      teacher_params: the teacher's weights, read if not given.

    Returns:
      The final TrainState.

    Raises:
      distributed.Preempted: the run was told to stop before its last step; its state is saved.
    """
    c, mesh = job.config, job.mesh
    metrics.write_run_files(workdir, c, job.prompts.counts, job.probe and job.probe.record())
    benchmark_run.write_shared(workdir, job.shared)

    # ---- State: the newest checkpoint, or the start.
    checkpoints = Checkpoints(workdir, c.checkpoint.keep)
    done, position = checkpoints.latest, None
    if done is None:
        state = start or job.start()
    else:
        state, position = checkpoints.restore(done, job.abstract_state())
    if teacher_params is None:
        teacher_params = job.teacher_params()

    # ---- Prompts and draws.
    prompts = data.batches(
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
    key, release_key = job.key(SAMPLING_KEY), job.key(RELEASE_KEY)
    responder = job.responder(job.key(benchmark_run.KEY))

    # ---- The loop. Metrics of a step are read after the next one is on its way.
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        preemption = stack.enter_context(distributed.Preemption())
        clock = stack.enter_context(metrics.PhaseClock())
        writer = stack.enter_context(metrics.MetricWriter.of(c, workdir, done))
        writer.say(str(job.prompts))
        # What is recorded of the step to go on from, as process 0 sees it.
        asked = [("eval", None), *(("benchmark", exam.benchmark.name) for exam in job.exams)]
        recorded = distributed.gathered([name in writer.recorded for name in asked])[0]
        there = {name for name, found in zip(asked, recorded, strict=True) if found}
        stack.enter_context(jax.transfer_guard("disallow"))
        read = Reader(job, writer, clock)

        def due(every: int, step: int) -> bool:
            return every > 0 and (step % every == 0 or step == c.train.steps)

        def evaluated(step: int, state, result: dict | None = None) -> float:
            result = dict(result or evaluate(job, state.params, teacher_params))
            rows = result.pop("rows")
            writer.write_evaluations([{"step": step} | row for row in rows])
            writer.write({"kind": "eval", "step": step} | result)
            read.restart()
            return result["kl"]

        def examined(step: int, state, exams):
            for exam in exams:
                result = benchmark_run.answer(exam, responder, state.params, c.eval.samples)
                benchmark_run.write(Path(workdir) / benchmark_run.FOLDER, step, result)
                del result["rows"]
                writer.write({"kind": "benchmark", "step": step} | result)
            read.restart()

        # The start; or what there was no time for after the step at which the run was stopped.
        first = done or 0
        if due(c.eval.benchmark_every, first):
            left = [exam for exam in job.exams if ("benchmark", exam.benchmark.name) not in there]
            examined(first, state, left)
        if due(c.eval.every, first) and ("eval", None) not in there:
            evaluated(first, state, start_evaluation if done is None else None)
        for step in range(first + 1, c.train.steps + 1):
            started = time.perf_counter()
            local = next(prompts)
            batch = sharding.put_batch(mesh, local)
            data_seconds = time.perf_counter() - started
            drawn = batch.tokens_BP, batch.mask_BP, key, state.step
            if job.teacher_writes:
                rollouts = job.sample_teacher(teacher_params, *drawn)
            else:
                rollouts = job.sample_group(state.params, *drawn)
            clock.watch("sample", step, rollouts.finished_B)
            reward = (job.reward(local.index_B, rollouts),) if c.reward.weight else ()
            lesson = teacher_params, rollouts, job.segment_table(rollouts), release_key, *reward
            noise = {}
            if due(c.metrics.gradient_noise_every, step):
                noise = job.gradient_noise(state.params, state.step, *lesson)
                clock.watch("gradient_noise", step, noise["gradient_norm_all"])
            state, measured, supervision = job.train_step(state, *lesson)
            clock.watch("train", step, measured["loss"])
            read.finish()
            read.begin(step, measured | noise, data_seconds, batch.index_B, rollouts, supervision)
            stopping = preemption.reached()
            evaluating = due(c.eval.every, step) and not stopping
            examining = bool(job.exams) and due(c.eval.benchmark_every, step) and not stopping
            saving = due(c.checkpoint.every, step) or (stopping and c.checkpoint.every > 0)
            if evaluating or examining or saving:
                read.finish()
            kl = evaluated(step, state) if evaluating else None
            if saving:
                writer.sync()
                checkpoints.save(step, state, prompts.state(), kl)
            if examining:  # the longest, and made when the run goes on if it ends here
                examined(step, state, job.exams)
            if stopping:
                writer.say(f"told to stop after step {step}; start again with the same --workdir to go on")
                raise distributed.Preempted
        read.finish()
    return state


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
                transcripts(self._job.tokenizer, step, rollouts, supervision, right)
            )


def main(_):
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is not set; give a folder for the run, such as runs/first")
    if flags.FLAGS.config is None:
        raise UserError("--config is not set; give a file of configs/, such as configs/demo.py")
    distributed.initialize()
    train(prepare(flags.FLAGS.config, flags.FLAGS.workdir), flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    run(main)
