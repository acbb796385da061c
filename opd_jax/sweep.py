"""An ablation: every arm with every seed, one after another, then one table and one page.

    python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/rule
    python -m opd_jax.sweep --config=configs/ablations/rule.py:configs/mine.py --out=runs/rule --jobs

Started again with the same --out it skips what is done and goes on where it stopped. --jobs writes a shell
file for each run that is not done, to be run anywhere that sees --out, in place of running it here.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from opd_jax import arms, sweep_table
from opd_jax.arms import Planned
from opd_jax.compare import read_lines
from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.metrics import METRICS_FILE, config_conflict

# What the student's start depends on: runs that agree in these share one evaluation of it.
START_SECTIONS = ("seed", "student", "teacher", "data", "rollout", "scoring", "mesh", "eval")


def is_done(planned: Planned) -> bool:
    """Whether a run has its last step, and the evaluation, benchmarks and checkpoint after it."""
    c = planned.config
    lines = read_lines(planned.workdir / METRICS_FILE) if _whole(planned.workdir / METRICS_FILE) else []
    last = [(line["kind"], line.get("benchmark")) for line in lines if line["step"] == c.train.steps]
    wanted = 1 + bool(c.eval.every) + len(c.eval.benchmark)
    saved = not c.checkpoint.every or (planned.workdir / "checkpoints" / str(c.train.steps)).is_dir()
    return saved and ("train", None) in last and len(set(last)) >= wanted


def _whole(path: Path) -> bool:
    """Whether a file is there and its last line is complete."""
    return path.is_file() and path.read_bytes().endswith(b"\n")


def carry_out(runs: Sequence[Planned]) -> None:
    """Runs what is not done, in order.

    Raises:
      UserError: a workdir holds a run of another config.
    """
    from opd_jax.evaluate import evaluate
    from opd_jax.job import prepare
    from opd_jax.train import train

    for planned in runs:
        conflict = config_conflict(planned.workdir, planned.config)
        if conflict:
            raise UserError(conflict)
    starts: dict[str, Mapping[str, Any]] = {}
    for number, planned in enumerate(runs, start=1):
        place = f"[{number}/{len(runs)}] {planned.arm}, seed {planned.seed}"
        if is_done(planned):
            print(f"{place}: done", flush=True)
            continue
        print(f"{place}: {planned.workdir}", flush=True)
        job = prepare(planned.config, planned.workdir)
        start = None
        if job.config.eval.every and not (planned.workdir / "checkpoints").is_dir():
            settings = job.config.to_dict()
            key = json.dumps({name: settings[name] for name in START_SECTIONS}, sort_keys=True)
            if key not in starts:
                starts[key] = evaluate(job, job.start().params, job.teacher_params())
            start = starts[key]
        train(job, planned.workdir, start)
        job.grader.close()


def write_jobs(
    runs: Sequence[Planned], folder: Path, config_argument: str, changes: Sequence[str]
) -> list[Path]:
    """Writes FOLDER/ARM-seed-N.sh for each run that is not done; returns the files.

    Args:
      config_argument, changes: --config=VALUE and the --config.KEY=VALUE of the command line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for planned in runs:
        if is_done(planned):
            continue
        overrides = {**planned.overrides, "seed": planned.seed}
        command = [
            "python",
            "-m",
            "opd_jax.train",
            f"--config={config_argument}",
            *changes,
            *(f"--config.{key}={value}" for key, value in overrides.items()),
            f"--workdir={planned.workdir}",
        ]
        file = folder / f"{planned.arm}-seed-{planned.seed}.sh"
        file.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
        file.chmod(0o755)
        files.append(file)
    return files


def main(_):
    options = flags.FLAGS
    if options.config is None:
        raise UserError("--config is not set; give a file of configs/ablations/")
    if not options.out:
        raise UserError("--out is not set; give a folder for the sweep, such as runs/rule")
    argument = next(a for a in _config_arguments(sys.argv))
    path = config_flags.get_config_filename(options["config"]).split(":")[0]
    seeds = [int(seed) for seed in options.seeds]
    runs = arms.plan(path, options.config, options.out, options.arms, seeds)
    if options.jobs:
        changes = [a for a in sys.argv[1:] if a.startswith("--config.")]
        for file in write_jobs(runs, Path(options.out) / "jobs", argument, changes):
            print(file)
        print("run these, each where its models are; then start this again without --jobs for the table")
        return
    carry_out(runs)
    print(sweep_table.write(runs, Path(options.out)))


def _config_arguments(argv: Sequence[str]):
    """The values of --config=VALUE and --config VALUE."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        if argument.startswith("--config="):
            yield argument.partition("=")[2]
        elif argument == "--config":
            yield following


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of the sweep.")
    flags.DEFINE_list("arms", [], "Only these arms, by name.")
    flags.DEFINE_list("seeds", [], "These seeds in place of the file's.")
    flags.DEFINE_bool("jobs", False, "Write a shell file a run instead of running.")
    run(main)
