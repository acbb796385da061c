"""The training loop.

    python -m opd_jax.train --config=configs/demo.py --workdir=runs/release
    python -m opd_jax.train --config=configs/demo.py --config.release.rule=none --workdir=runs/full

Started again with the same --workdir, it continues from the newest checkpoint. SIGTERM ends it after the
current step, with a checkpoint and exit status 75. docs/pods.md tells how to run it on a TPU pod.
"""

import contextlib
import functools
import time
from pathlib import Path

import jax
from absl import flags

from opd_jax.config import run
from opd_jax.distill import StepInputs, TrainState
from opd_jax.errors import UserError
from opd_jax.evaluation import answering, evaluate
from opd_jax.parallel import distributed, sharding
from opd_jax.progress import Progress, own
from opd_jax.run import Job, Key, Session, StepReader, due, metrics, prepare, transcripts

# What the devices do, by the names that the loop gives its clock.
DOING = {"sample": "sampling", "train": "scoring and updating", "gradient_noise": "the gradient's noise"}


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
      start_evaluation: what `evaluate` returned for this run's start, if several runs share it;
        measured if not given.
      progress: shows what goes on, with `work` already planned; a new one if not given.
      start: the state before the first step, read if not given; its arrays are donated.
      teacher_params: the teacher's weights, read if not given.

    Returns:
      The final TrainState.

    Raises:
      distributed.Preempted: the run was told to stop before its last step; its state is saved.
    """
    c = job.config
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(own(progress))

        # ---- State: the newest checkpoint, or the start.
        session = stack.enter_context(Session(c, workdir, shown))
        metrics.write_run_files(workdir, c, job.prompts.counts, job.probe and job.probe.record())
        answering.write_shared(workdir, job.shared)
        state, position = session.state(lambda: start or job.start(), job.abstract_state)
        if teacher_params is None:
            with shown.phase("reading the teacher's weights"):
                teacher_params = job.teacher_params()

        # ---- Prompts and draws.
        prompts = job.training_batches(position)
        draw, release_key = job.training_draw(teacher_params), job.key(Key.RELEASE)
        response_sampler = job.response_sampler()

        # ---- The loop. Metrics of a step are read after the next one is on its way.
        clock = stack.enter_context(metrics.PhaseClock(_telling(shown, c.train.steps)))
        writer = session.record()
        writer.say(str(job.prompts))
        names = [rendered.benchmark.name for rendered in job.rendered_benchmarks]
        there = session.recorded([("eval", None), *(("benchmark", name) for name in names)])
        stack.enter_context(jax.transfer_guard("disallow"))
        read = StepReader(writer, c, session.skipped)

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

        # Evaluations of the start, or those that were due after the step at which the run was stopped.
        first = session.first
        if progress is None:
            shown.plan(work(c))
        for name, count in work(c, first).items():
            shown.skip(name, work(c)[name] - count)
        if due(c, c.eval.benchmark_every, first):
            answer_benchmarks(first, state, there)
        if due(c, c.eval.every, first):
            given = start_evaluation if session.done is None else None
            if given or ("eval", None) in there:
                shown.skip("evaluation")
            if ("eval", None) not in there:
                evaluate_heldout(first, state, given)
        for step in range(first + 1, c.train.steps + 1):
            started = time.perf_counter()
            local = next(prompts)
            data_seconds, width = time.perf_counter() - started, local.tokens_BP.shape[1]
            writes = teacher_params if job.teacher_writes else state.params
            batch, rollouts = draw(writes, local, state.step, shown)
            clock.watch("sample", step, rollouts.finished_B)
            reward_B = None
            if c.reward.weight:  # the host waits for the sampler here
                with shown.phase(f"step {step}/{c.train.steps}: sampling, then grading", kind="grading"):
                    reward_B = job.reward(local.index_B, rollouts)
            inputs = StepInputs(teacher_params, rollouts, job.segment_table(rollouts), release_key, reward_B)
            noise = {}
            if due(c, c.metrics.gradient_noise_every, step):
                with shown.compiling("the gradient's noise", job.gradient_noise, width):
                    noise = job.gradient_noise(state.params, state.step, inputs)
                clock.watch("gradient_noise", step, noise["gradient_norm_all"])
            with shown.compiling("the training step", job.train_step, width):
                state, measured, supervision = job.train_step(state, inputs)
            clock.watch("train", step, measured["loss"])
            read.finish()
            kept = _rollouts_to_keep(job, step, (batch.index_B, rollouts.replace(scores=None), supervision))
            read.begin(
                step,
                measured | noise,
                functools.partial(_finished, job, writer, clock, step, data_seconds, kept),
            )
            stopping = session.stopping()
            evaluating = due(c, c.eval.every, step) and not stopping
            benchmarking = bool(names) and due(c, c.eval.benchmark_every, step) and not stopping
            saving = session.saves(step, stopping)
            if evaluating or benchmarking or saving:
                read.finish()
            kl = evaluate_heldout(step, state) if evaluating else None
            if saving:
                session.save(step, state, prompts.state(), kl)
            if benchmarking:  # last, since it takes longest; a run that ends here makes it up later
                answer_benchmarks(step, state)
            if stopping:
                read.finish()
                session.stop(step)
        read.finish()
        session.sync()
    return state


def _telling(shown: Progress, total: int):
    """What a PhaseClock calls when the devices begin another phase."""

    def told(now):
        if now is None:
            shown.device(None)
        else:
            shown.device(f"step {now[0]}/{total}: {DOING[now[1]]}", now[1])

    return told


def _rollouts_to_keep(job: Job, step: int, arrays):
    """The first rows of `arrays`, on every host, if this step's rollouts are to be written; else None."""
    c = job.config.metrics
    if not (c.rollouts_every and c.rollouts):
        return None
    if step % c.rollouts_every and step not in (1, job.config.train.steps):
        return None
    return sharding.first_rows(job.mesh, arrays, c.rollouts)


def _finished(job: Job, writer, clock, step: int, data_seconds: float, kept) -> dict:
    """Writes the rollouts of a finished step; returns the seconds of its phases."""
    if kept is not None and writer.active:
        index_Q, rollouts, supervision = jax.device_get(kept)
        right = job.graded(index_Q, rollouts)
        writer.write_rollouts(transcripts.records(job.tokenizer, step, rollouts, supervision, right))
    phases = {f"seconds_{name}": value for name, value in clock.pop(step).items()}
    return {"seconds_data": data_seconds} | phases


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
