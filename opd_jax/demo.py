"""A real language model heals a smaller one: full supervision against the release rule, side by side.

    make demo
    python -m opd_jax.demo --out=runs/demo --config.seed=1
"""

import copy
import json
import sys
import time
from pathlib import Path

from absl import flags

from opd_jax import report
from opd_jax.config import run
from opd_jax.evaluate import evaluate
from opd_jax.job import Job, prepare
from opd_jax.metrics import EVALUATIONS_FILE
from opd_jax.progress import Progress, own
from opd_jax.run_record import Run, column, phase_seconds, read_run
from opd_jax.train import train, work

ARMS = {"full": "none", "release": "paper"}

INTRODUCTION = """
Teacher: {teacher} ({teacher_layers} layers, {teacher_size:.0f}M parameters).
Student: {student} without layers {dropped} ({student_size:.0f}M parameters).
The student answers {batch} prompts a step; the teacher scores every token it wrote; the student learns.
{steps} steps with full supervision, then {steps} with the release rule: same start, prompts and seeds.
"""


def main(_):
    started = time.perf_counter()
    out = Path(flags.FLAGS.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    jobs = prepare_arms(flags.FLAGS.config, out)
    print(introduction(jobs["full"]), flush=True)
    runs = train_arms(jobs, out)
    answers = before_and_after(out)
    print("\n" + table(runs))
    print(f"\nprompt   {answers['prompt']}")
    for label, text in answers["answers"].items():
        print(f"\n{label:<8} {' '.join(text.split())}")
    page = report.build(
        [out / arm for arm in ARMS], out / "report.html", titles=list(ARMS), answers=[answers]
    )
    minutes = (time.perf_counter() - started) / 60
    print(f"\nreport   {page}\n         {minutes:.1f} minutes in all")


def prepare_arms(config, out: Path) -> dict[str, Job]:
    """The checked job of each arm: the config with the arm's release rule.

    Raises:
      UserError: the first thing that is wrong.
    """
    jobs = {}
    for arm, rule in ARMS.items():
        config = copy.deepcopy(config)
        config.release.rule = rule
        jobs[arm] = prepare(config, out / arm)
    return jobs


def train_arms(jobs: dict[str, Job], out: Path, progress: Progress | None = None) -> dict[str, Run]:
    """Evaluates the start that all arms share, trains each in its folder of `out`, and reads the records."""
    first = next(iter(jobs.values()))
    with own(progress) as shown:
        shown.expect("evaluation")  # of the start; each arm leaves out its own
        for job in jobs.values():
            shown.plan(work(job.config))
        with shown.phase("reading the weights"):
            weights = first.start().params, first.teacher_params()
        start = evaluate(first, *weights, shown)
        del weights
        for arm, job in jobs.items():
            shown.say(f"— {arm}: release.rule={job.config.release.rule}, workdir {out / arm}", sys.stdout)
            with shown.titled(arm):
                train(job, out / arm, start, shown)
    return {arm: read_run(out / arm, arm) for arm in jobs}


def introduction(job) -> str:
    """What is about to happen, in numbers from the job."""
    c = job.config
    return INTRODUCTION.format(
        teacher=c.teacher.path,
        teacher_layers=job.teacher.layers,
        teacher_size=job.teacher.parameter_count() / 1e6,
        student=c.student.path,
        dropped=", ".join(map(str, c.student.drop_layers)),
        student_size=job.student.parameter_count() / 1e6,
        batch=c.rollout.batch,
        steps=c.train.steps,
    )


def table(runs) -> str:
    """start, full, release: one column each, as text."""

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
    widths = [max(map(len, rows))] + [
        max(len(name), *map(len, cells)) for name, cells in columns.items()
    ]
    lines = [["", *columns], *zip(rows, *columns.values(), strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def before_and_after(out: Path) -> dict:
    """One held-out prompt with what the student wrote at the start and at the end of each arm.

    All three draw from the same uniform numbers, so they differ by the student alone. The prompt is the
    first whose answer ended by itself in every arm, or the first one.
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


def _evaluations(workdir: Path) -> dict[int, dict[int, dict]]:
    """step -> prompt number -> line of evaluations.jsonl."""
    found = {}
    for line in (workdir / EVALUATIONS_FILE).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {})[row["prompt"]] = row
    return found


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of both runs; runs/demo-DATE-TIME if not given.")
    run(main, config="configs/demo.py")
