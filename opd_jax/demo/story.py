"""The demo: measure the machine, choose sizes, train both arms, write long answers, and report."""

import copy
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from opd_jax.demo import plan as demo_plan
from opd_jax.distill import TrainState
from opd_jax.errors import UserError
from opd_jax.evaluation import evaluate, evaluate_teacher
from opd_jax.models import cpu
from opd_jax.progress import Progress, own
from opd_jax.report import build as report
from opd_jax.report import long as report_long
from opd_jax.run import (
    EVALUATIONS_FILE,
    Job,
    Run,
    column,
    long_job,
    phase_seconds,
    prepare,
    preview,
    read_config,
    read_run,
    write_text,
)
from opd_jax.train import train, work

ARMS = {"full": "none", "release": "paper"}
LONG_FILE = "long_answers.jsonl"
LOOK = "long answers"  # the piece of work

INTRODUCTION = """
Teacher: {teacher} ({teacher_layers} layers, {teacher_size:.0f}M parameters).
Student: {student} without layers {dropped} ({student_size:.0f}M parameters).
The student answers {batch} prompts a step; the teacher scores every token it wrote; the student learns.
Twice from the same start, with the same prompts and seeds: with full supervision, then with the release rule.
"""


def main(_):
    options = flags.FLAGS
    if options.minutes < 0:
        raise UserError(f"--minutes={options.minutes:g} is out of range; give a time, or 0 for no limit")
    if not options.config.eval.every or not options.config.data.heldout:
        raise UserError("the demo evaluates its student; set eval.every and data.heldout to 1 or more")
    budget = demo_plan.Budget(options.minutes)
    out = Path(options.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    with Progress() as progress:
        runs, records = run_arms(options.config, out, budget, progress)
    shown = before_and_after(out)
    page = report.build(
        [out / arm for arm in ARMS],
        out / "report.html",
        titles=list(ARMS),
        answers=[shown],
        lead=report_long.section(records),
    )
    print("\n" + table(runs))
    print(f"\nprompt   {shown['prompt']}")
    for label, text in shown["answers"].items():
        print(f"\n{label:<8} {' '.join(text.split())}")
    print(f"\nAsked for long answers: {report_long.summarise(records)}")
    limit = f" of a budget of {budget.minutes:g}" if budget.minutes else ""
    print(f"\nreport   {page}\n         {budget.spent / 60:.1f} minutes in all{limit}")


def run_arms(
    config: ConfigDict, out: Path, budget: demo_plan.Budget, progress: Progress
) -> tuple[dict[str, Run], list[dict]]:
    """Runs the demo in the folder `out`. Returns (the record of each arm, long answers of the release arm).

    Args:
      config: its sizes are lowered in place to fit the budget, or to those of a demo that has begun in `out`.
    """
    # ---- The sizes, from the speed of the machine's products; then all checks.
    begun = read_config(out / next(iter(ARMS)))
    if begun is not None:
        keys = (*demo_plan.KEYS, "train.steps", "train.micro_batch")
        config.update_from_flattened_dict({key: _value(begun, key) for key in keys})
    job = prepare(config, progress=progress)
    sizes, machine = fitting_sizes(job, config, budget.left)
    lowered = {} if begun is not None else sizes.apply(config)
    job = prepare_arms(config, out, progress)[next(iter(ARMS))]
    long_job(config, *demo_plan.LOOKS[-1], progress)
    progress.say(f"\nMachine: {machine}.\n{introduction(job)}", sys.stdout)

    # ---- The evaluation of the start, which is also the measurement; then the teacher's own answers.
    with progress.phase("reading the weights"):
        teacher_params, start = job.teacher_params(), job.start()
    evaluation, measured = measure(job, start.params, teacher_params, progress)
    evaluation |= teacher_baseline(job, teacher_params, progress)
    plan = demo_plan.fit(measured, sizes, config.train.steps, budget.left)
    if begun is not None:
        plan = dataclasses.replace(plan, steps=config.train.steps)
    progress.say(announcement(plan, measured, lowered, budget.spent), sys.stdout)
    config.train.steps = plan.steps

    # ---- Both arms.
    progress.expect("step", 0, measured.step)
    progress.expect(LOOK, 1, measured.look(*plan.look))
    jobs = prepare_arms(config, out, progress)
    params = train_arms(jobs, out, evaluation, start, teacher_params, progress).params

    # ---- Long answers of the student that was trained with the rule.
    answers, tokens = demo_plan.choose_look(measured, budget.left - demo_plan.REPORT_SECONDS)
    progress.expect(LOOK, 0, measured.look(answers, tokens))
    progress.say(f"— {answers} long answers of up to {tokens} tokens", sys.stdout)
    with progress.work(LOOK, "long answers"):
        records = preview(long_job(config, answers, tokens, progress), params, teacher_params, progress)
    write_text(out / LONG_FILE, "".join(json.dumps(record) + "\n" for record in records))
    return read_arms(out), records


def fitting_sizes(job: Job, config: ConfigDict, left: float) -> tuple[demo_plan.Sizes, str]:
    """Returns (sizes at which enough steps fit into the seconds left, the machine in words).

    An accelerator gets the full sizes; the evaluation of the start measures its speed.
    """
    devices = job.mesh.devices
    if devices.flat[0].platform != "cpu":
        return demo_plan.WHOLE, f"{devices.size} x {devices.flat[0].device_kind}"
    probe = cpu.probe()
    rate = probe.bfloat16 if job.student.narrow else probe.float32
    sizes = demo_plan.choose_sizes(job.student, job.teacher, config, rate, left)
    kind = "bfloat16" if job.student.narrow else "float32"
    return sizes, f"{cpu.name()}; {kind} products of {rate / 1e9:.0f} GFLOP/s"


def prepare_arms(config: ConfigDict, out: Path, progress: Progress | None = None) -> dict[str, Job]:
    """The checked job of each arm: the config with the arm's release rule.

    Raises:
      UserError: names the first problem.
    """
    jobs = {}
    for arm, rule in ARMS.items():
        config = copy.deepcopy(config)
        config.release.rule = rule
        jobs[arm] = prepare(config, out / arm, progress)
    return jobs


def train_arms(
    jobs: dict[str, Job],
    out: Path,
    evaluation: dict | None = None,
    start: TrainState | None = None,
    teacher_params: dict | None = None,
    progress: Progress | None = None,
) -> TrainState:
    """Trains each arm in its folder of `out` from the same start. Returns the final state of the last arm.

    Args:
      evaluation: result of `evaluate` for the start; measured by default.
      start: the state before the first step, which is donated.
      teacher_params: the teacher's weights. If `start` or these are missing, both are read.
    """
    *_, last = jobs
    with own(progress) as shown:
        for job in jobs.values():
            shown.plan(work(job.config))
        if start is None or teacher_params is None:
            with shown.phase("reading the weights"):
                start, teacher_params = jobs[last].start(), jobs[last].teacher_params()
        if evaluation is None:
            shown.expect("evaluation")
            evaluation = evaluate(jobs[last], start.params, teacher_params, shown)
        for arm, job in jobs.items():
            shown.say(f"— {arm}: release.rule={job.config.release.rule}, workdir {out / arm}", sys.stdout)
            taken = start if arm == last else jax.tree.map(jnp.copy, start)
            with shown.titled(arm):
                state = train(job, out / arm, evaluation, shown, start=taken, teacher_params=teacher_params)
            if arm != last:
                del state, taken  # keeps at most two states in memory
    return state


def read_arms(out: Path) -> dict[str, Run]:
    """The record of each arm."""
    return {arm: read_run(out / arm, arm) for arm in ARMS}


def teacher_baseline(job: Job, teacher_params: dict, progress: Progress | None = None) -> dict[str, float]:
    """How the teacher itself answers the held-out prompts, under the names in the start's evaluation."""
    found = evaluate_teacher(job, teacher_params, progress)
    names = ("response_length", "finished_share", "repeated_share")
    return {f"teacher_{name}": found[name] for name in names}


def measure(job: Job, params: dict, teacher_params: dict, progress: Progress | None = None) -> tuple:
    """Returns (the evaluation of the start, the machine's speed as demo_plan.Measured)."""
    c = job.config
    batches = -(-c.data.heldout // c.rollout.batch)
    timed = 1 if batches > 1 else 2  # a single batch is evaluated again after compilation
    if progress is not None:
        progress.expect("evaluation", timed)
    results = [evaluate(job, params, teacher_params, progress) for _ in range(timed)]
    sample, compare = results[-1]["seconds_sample"], results[-1]["seconds_compare"]
    compiling = max(results[0]["seconds"] - batches * (sample + compare), 0.0)
    shape = c.rollout.batch, c.data.prompt_tokens, c.rollout.max_tokens
    return results[0], demo_plan.Measured(sample, compare, compiling, *shape)


def announcement(
    plan: demo_plan.Plan, measured: demo_plan.Measured, lowered: dict[str, tuple[int, int]], spent: float
) -> str:
    """Text that says what will be done, how long it will take, and what is left out.

    Args:
      lowered: config key -> (old value, new value).
      spent: seconds since the start.
    """
    seconds = spent + sum(plan.seconds.values())
    answers, tokens = plan.look
    lines = [
        f"{measured.batch} answers take {measured.sample:.1f} s to write and {measured.compare:.1f} s to"
        f" compare with the teacher. {plan.steps} steps an arm, about {measured.step:.0f} s each, then"
        f" {answers} long answers of up to {tokens} tokens: {seconds / 60:.0f} minutes in all."
    ]
    left_out = [f"{key} is {now} in place of {before}" for key, (before, now) in lowered.items()]
    if plan.steps < plan.most:
        minutes = (seconds + plan.more_seconds) / 60
        left_out.insert(
            0, f"{plan.most - plan.steps} of {plan.most} steps an arm ({minutes:.0f} minutes at these sizes)"
        )
    if left_out:
        lines.append(f"Left out for speed: {'; '.join(left_out)}. More time does more: --minutes=N.")
    return "\n".join(lines) + "\n"


def introduction(job: Job) -> str:
    """Text that describes the job in numbers."""
    c = job.config
    return INTRODUCTION.format(
        teacher=c.teacher.path,
        teacher_layers=job.teacher.layers,
        teacher_size=job.teacher.parameter_count() / 1e6,
        student=c.student.path,
        dropped=", ".join(map(str, c.student.drop_layers)),
        student_size=job.student.parameter_count() / 1e6,
        batch=c.rollout.batch,
    )


def table(runs: dict[str, Run]) -> str:
    """A text table with columns for start, full, release, and the teacher if its answers were measured."""

    def evaluated(line):
        return [
            f"{line['kl']:.3f} [{line['kl_low']:.3f}, {line['kl_high']:.3f}]",
            f"{line['response_length']:.1f}",
            f"{line['finished_share']:.0%}",
        ]

    def trained(run):
        supervised, written = (
            sum(column(run.train, name)[1]) for name in ("supervised_tokens", "response_tokens")
        )
        seconds = phase_seconds(run) | {"evaluate": run.evals[-1]["seconds"]}
        return [
            f"{supervised:,.0f} of {written:,.0f}",
            *(f"{seconds[name]:.2f}" for name in ("sample", "train", "evaluate")),
        ]

    rows = [
        "held-out KL(student‖teacher), nats/token",
        "response length, tokens",
        "finished share",
        "supervised tokens",
        "seconds a step: sample",
        "seconds a step: score, release, update",
        "seconds an evaluation",
    ]
    first = next(iter(runs.values()))
    columns = {"start": [*evaluated(first.evals[0]), "–", "–", "–", "–"]}
    columns |= {arm: evaluated(run.evals[-1]) + trained(run) for arm, run in runs.items()}
    start = first.evals[0]
    if "teacher_finished_share" in start:
        length, finished = start["teacher_response_length"], start["teacher_finished_share"]
        columns["teacher"] = ["–", f"{length:.1f}", f"{finished:.0%}", "–", "–", "–", "–"]
    widths = [max(map(len, rows))] + [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    lines = [["", *columns], *zip(rows, *columns.values(), strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def before_and_after(out: Path) -> dict:
    """One held-out prompt with the student's answers at the start and after each arm.

    All three are sampled with the same uniform numbers, so only the student differs. The prompt is the first
    one whose answer ended by itself in every arm, or else the first of all.
    """
    rows = {arm: _evaluations(out / arm) for arm in ARMS}
    last = {arm: max(lines) for arm, lines in rows.items()}
    final = {arm: lines[last[arm]] for arm, lines in rows.items()}
    start = rows["full"][0]
    done = [i for i in start if all(answers[i]["finished"] for answers in final.values())]
    number = done[0] if done else min(start)
    return {
        "prompt": start[number]["text"],
        "answers": {"start": start[number]["response"]}
        | {arm: answers[number]["response"] for arm, answers in final.items()},
    }


def _value(config: dict, key: str):
    """The value of a dotted key of a config.json."""
    for part in key.split("."):
        config = config[part]
    return config


def _evaluations(workdir: Path) -> dict[int, dict[int, dict]]:
    """step -> prompt number -> line of evaluations.jsonl."""
    found = {}
    for line in (workdir / EVALUATIONS_FILE).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {})[row["prompt"]] = row
    return found
