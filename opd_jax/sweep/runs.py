"""The runs of a sweep: one after another in this process, or as job files."""

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from opd_jax.errors import UserError
from opd_jax.evaluation import answering, read_lines
from opd_jax.parallel import distributed
from opd_jax.progress import Progress, own
from opd_jax.run import METRICS_FILE, config_conflict, make_folder
from opd_jax.sweep import arms
from opd_jax.sweep import table as sweep_table
from opd_jax.sweep.arms import Planned
from opd_jax.sweep.table import TEACHER

# Settings that the student's start depends on. Runs that agree in these share one evaluation of it.
START_SECTIONS = ("seed", "student", "teacher", "data", "rollout", "scoring", "mesh")
OVERHEAD = "compiling and reading"  # a piece of each run, in the plan
# Settings that the teacher's answers depend on.
TEACHER_READS = ("seed", "teacher", "student", "data", "rollout", "eval")
TEACHER_FILE = "settings.json"  # in the folder of its answers; written when all of them are there


def is_done(planned: Planned) -> bool:
    """Whether a run has done its last step, and the evaluation, benchmarks and checkpoint after it."""
    c = planned.config
    lines = read_lines(planned.workdir / METRICS_FILE) if _whole(planned.workdir / METRICS_FILE) else []
    last = {(line["kind"], line.get("benchmark")) for line in lines if line["step"] == c.train.steps}
    last.discard(("alarm", None))
    wanted = 1 + bool(c.eval.every) + len(c.eval.benchmark)
    saved = not c.checkpoint.every or (planned.workdir / "checkpoints" / str(c.train.steps)).is_dir()
    return saved and ("train", None) in last and len(last) >= wanted


def _whole(path: Path) -> bool:
    """Whether a file exists and its last line is complete."""
    return path.is_file() and path.read_bytes().endswith(b"\n")


def train_all(runs: Sequence[Planned], progress: Progress | None = None) -> None:
    """Runs what is not done, in order. Call it in every process.

    Args:
      progress: shows the progress of all runs; a new one by default.

    Raises:
      UserError: a workdir holds a run of another config.
    """
    from opd_jax.evaluation import evaluate
    from opd_jax.run import prepare
    from opd_jax.train import train, work

    for planned in runs:
        conflict = config_conflict(planned.workdir, planned.config)
        if conflict:
            raise conflict
    # Process 0 decides for all, before anything runs, because the folders change while the others look.
    done = [is_done(planned) for planned in runs]
    fresh = [not (planned.workdir / "checkpoints").is_dir() for planned in runs]
    done, fresh = distributed.gathered([done, fresh])[0]
    starts: dict[str, dict[str, Any]] = {}

    def carry(planned: Planned, fresh: bool, shown: Progress):
        job = prepare(planned.config, planned.workdir, shown)
        start = None
        if job.config.eval.every and fresh:
            settings = job.config.to_dict()
            key = json.dumps({name: settings[name] for name in START_SECTIONS}, sort_keys=True)
            if key not in starts:
                with shown.phase("reading the weights"):
                    weights = job.start().params, job.teacher_params()
                shown.expect("evaluation")  # in addition to the run's own, which is then skipped
                starts[key] = evaluate(job, *weights, shown)
                del weights
            start = starts[key]
        train(job, planned.workdir, start, shown)

    with own(progress) as shown:
        for planned, is_there in zip(runs, done, strict=True):
            if not is_there:
                shown.plan(work(planned.config) | {OVERHEAD: 1})
        for number, planned in enumerate(runs):
            run_name = f"[{number + 1}/{len(runs)}] {planned.arm}, seed {planned.seed}"
            if done[number]:
                shown.say(f"{run_name}: done", sys.stdout)
                continue
            left = f"; {text} in all" if (text := shown.left_text()) else ""
            shown.say(f"{run_name}: {planned.workdir}{left}", sys.stdout)
            started, worked = time.monotonic(), shown.worked
            with shown.titled(f"{number + 1}/{len(runs)} {planned.arm}"):
                carry(planned, fresh[number], shown)
            shown.done(OVERHEAD, time.monotonic() - started - (shown.worked - worked))


def benchmark_teacher(planned: Planned, out: Path, progress: Progress | None = None) -> None:
    """The teacher of a run answers the run's benchmarks, once, as the student does. Call it in every process.

    Writes OUT/teacher/NAME-model.jsonl and .json. Does nothing if answers with the same settings are there.
    """
    from opd_jax.run import prepare

    config, folder = planned.config, out / TEACHER
    if not config.eval.benchmark:
        return
    settings = config.to_dict()
    wanted = json.dumps({name: settings[name] for name in TEACHER_READS}, sort_keys=True, indent=1)
    there = folder / TEACHER_FILE
    done = there.is_file() and there.read_text(encoding="utf-8") == wanted
    if distributed.gathered([done])[0][0]:
        return
    if jax.process_index() == 0:
        print(f"teacher: {config.teacher.path} answers {', '.join(config.eval.benchmark)}", flush=True)
    with own(progress) as shown:
        job = prepare(config, progress=shown)
        with shown.phase("reading the teacher's weights"):
            params = job.teacher_params()
        response_sampler = job.teacher_sampler()
        shown.expect("teacher's benchmark", len(job.rendered_benchmarks))
        for rendered in job.rendered_benchmarks:
            result = answering.answer(
                *(rendered, response_sampler, params, config.eval.samples, shown, "teacher's benchmark")
            )
            answering.write(folder, "model", result)
    if jax.process_index() == 0:
        there.write_text(wanted, encoding="utf-8")


def write_jobs(
    runs: Sequence[Planned],
    folder: Path,
    config_argument: str,
    changes: Sequence[str],
    settings: Path | None = None,
) -> list[Path]:
    """Writes FOLDER/ARM-seed-N.sh for each run that is not done; returns the files.

    Args:
      config_argument: VALUE of --config=VALUE.
      changes: the words --config.KEY=VALUE of the command line, from `changes_of`.
      settings: a settings file of launch/. Each file is then a copy of it for its run, and says how to launch
        it. Without settings each file is a command for this interpreter and this folder.

    Raises:
      UserError: there is no such settings file.
    """
    if settings is not None and not settings.is_file():
        raise UserError(f"--settings={settings}: no such file; copy launch/settings.example.sh there")
    make_folder(folder, "--jobs")
    files = []
    for planned in runs:
        if is_done(planned):
            continue
        overrides = {**planned.overrides, "seed": planned.seed}
        arguments = [*changes, *(f"--config.{key}={value}" for key, value in overrides.items())]
        name = f"{planned.arm}-seed-{planned.seed}"
        file = folder / f"{name}.sh"
        if settings is None:
            command = [sys.executable, "-m", "opd_jax.train", f"--config={config_argument}"]
            command += [*arguments, f"--workdir={planned.workdir}"]
            here = shlex.quote(str(Path.cwd()))
            file.write_text(f"#!/bin/sh\ncd {here} || exit 2\nexec {shlex.join(command)}\n")
            file.chmod(0o755)
        else:
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
            file.write_text(
                f"# SETTINGS={shlex.quote(str(file))} launch/tpu.sh run\n{settings.read_text()}\n"
                f"# ---- {planned.arm}, seed {planned.seed}\nNAME=$NAME-{slug}\n"
                f"CONFIG={shlex.quote(config_argument)}\nCONFIG_ARGS=({shlex.join(arguments)})\n"
                f"WORKDIR={shlex.quote(str(planned.workdir))}\n"
            )
        files.append(file)
    return files


def main(_):
    options = flags.FLAGS
    distributed.initialize()
    if options.config is None:
        raise UserError("--config is not set; give a file of configs/ablations/")
    if not options.out:
        raise UserError("--out is not set; give a folder for the sweep, such as runs/rule")
    argument = next(a for a in _config_arguments(sys.argv))
    path = config_flags.get_config_filename(options["config"]).split(":")[0]
    if not all(seed.isdigit() for seed in options.seeds):
        raise UserError(f"--seeds={','.join(options.seeds)}: give whole numbers, such as 0,1,2")
    seeds = [int(seed) for seed in options.seeds]
    runs = arms.plan(path, options.config, options.out, options.arms, seeds)
    if not options.jobs:
        make_folder(options.out)
    if options.jobs:
        changes = changes_of(sys.argv[1:])
        settings = Path(options.settings) if options.settings else None
        for file in write_jobs(runs, Path(options.jobs), argument, changes, settings):
            print(file)
        print(f"run these; then, where {options.out} is seen, the same with --table in place of --jobs")
        if runs[0].config.eval.benchmark:
            print("the teacher's row: the same with --teacher in place of --jobs, on a machine that holds it")
        return
    if options.teacher:
        benchmark_teacher(runs[0], Path(options.out))
        return
    if options.table:
        runs = [planned for planned in runs if is_done(planned)]
        if not runs:
            raise UserError(f"--table: no run of {options.out} is done")
    else:
        train_all(runs)
        benchmark_teacher(runs[0], Path(options.out))
    if jax.process_index() == 0:
        print(sweep_table.write(runs, Path(options.out)))


def changes_of(argv: Sequence[str]) -> list[str]:
    """The words of a command that change the config, each as --config.KEY=VALUE."""
    found = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        if argument.startswith("--config.") and "=" not in argument and not following.startswith("--"):
            argument = f"{argument}={following}"
        if argument.startswith(("--config.", "--noconfig.")):
            found.append(argument)
    return found


def _config_arguments(argv: Sequence[str]):
    """The values of --config=VALUE and --config VALUE."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        if argument.startswith("--config="):
            yield argument.partition("=")[2]
        elif argument == "--config":
            yield following
