"""What the study's report reads: the runs of its sweeps, as rows.

A sweep is a folder of OUT/ARM/seed-N, as `opd_jax.sweep` leaves it.
"""

import contextlib
import csv
import re
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.errors import UserError
from opd_jax.evaluation import read_lines
from opd_jax.run import read_run
from studies import sorting

QUESTION = re.compile(r"Sort [\d ]+ (?:upwards|downwards)\.")
SEED = re.compile(r"seed-\d+")


def evaluations(workdir: Path, arm: str, seed: int, graded: bool) -> list[dict[str, Any]]:
    """One row an evaluation of one run: KL, lengths, supervised tokens so far, and accuracy if graded."""
    run = read_run(workdir)
    answers = read_lines(workdir / "evaluations.jsonl") if graded else []
    rows = []
    for line in run.evals:
        trained = [other for other in run.train if other["step"] <= line["step"]]
        row = {
            "arm": arm,
            "seed": seed,
            "step": line["step"],
            "kl": line["kl"],
            "teacher_logp": line["teacher_logp"],
            "response_length": line["response_length"],
            "finished_share": line["finished_share"],
            "supervised_tokens": sum(other["supervised_tokens"] for other in trained),
            "response_tokens": sum(other["response_tokens"] for other in trained),
            "accepted_share": np.mean([other["accepted_share"] for other in trained]) if trained else 0.0,
        }
        if graded:
            right = [
                sorting.first_error(_text(answer["response"]), sorting.solution_of(answer["text"])) is None
                for answer in answers
                if answer["step"] == line["step"]
            ]
            row["accuracy"] = float(np.mean(right))
        rows.append(row)
    return rows


def rollouts(workdir: Path, seed: int) -> list[dict[str, Any]]:
    """One row a logged rollout: sentences, kept ones, first wrong one, and each sentence's margin."""
    rows = []
    for record in read_run(workdir).rollouts:
        right = sorting.solution_of(QUESTION.search(record["prompt"])[0])
        text = _text("".join(sentence["text"] for sentence in record["sentences"]))
        rows.append(
            {
                "seed": seed,
                "step": record["step"],
                "sentences": len(record["sentences"]),
                "accepted": record["accepted"],
                "gain": record["gain"],
                "kept": sum(sentence["kept"] for sentence in record["sentences"]),
                "first_error": sorting.first_error(text, right),
                "margins": [sentence["contrast"] for sentence in record["sentences"]],
            }
        )
    return rows


def read_sweep(task: str, folder: Path) -> list[dict[str, Any]]:
    """`evaluations` of every run of a sweep, arm by arm.

    Raises:
      UserError: the folder holds no run, none of the arm `full` (but for sorting_rescale), or one that has no
        evaluation yet or did not come as far as the others.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in _arms(folder):
        for path in _seeds(folder / arm):
            with _naming(task):
                rows = evaluations(path, arm, _number(path), task != "pair")
            found[f"{arm}/{path.name}"] = rows
    if not found:
        raise UserError(
            f"--{task}={folder} holds no run of a sweep (ARM/seed-N); run configs/study/{task}.py there, or "
            f"leave the task out by --{task}="
        )
    if task != "sorting_rescale" and not any(run.startswith("full/") for run in found):
        raise UserError(f"--{task}={folder} lacks the arm full, which others are compared with; run it too")
    ends = {run: rows[-1]["step"] if rows else -1 for run, rows in found.items()}
    last = max(0, *ends.values())
    short = [run for run, step in ends.items() if step < last]
    if short:
        raise UserError(
            f"--{task}={folder}: {', '.join(short)} did not come as far as step {last}; start the sweep "
            "again, it goes on where it stopped"
        )
    return [{"task": task} | row for rows in found.values() for row in rows]


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """`rollouts` of all seeds of the sorting sweep's `release` arm.

    Raises:
      UserError: there are none.
    """
    with _naming("sorting"):
        rows = [row for path in _seeds(folder / "release") for row in rollouts(path, _number(path))]
    if not rows:
        raise UserError(f"--sorting={folder}: no rollouts.jsonl in release/seed-N; run the arm release too")
    return rows


def _text(response: str) -> str:
    return response.removesuffix("<|end|>")


def _arms(folder: Path) -> list[str]:
    """The arms that have runs, in the order of the sweep's table; before there is one, full first."""
    there = {path.name for path in folder.glob("*") if _seeds(path)}
    there = sorted(there, key=lambda name: (name != "full", name))
    if not (folder / "table.csv").is_file():
        return there
    with (folder / "table.csv").open() as file:
        return [row["arm"] for row in csv.DictReader(file) if row["arm"] in there]


@contextlib.contextmanager
def _naming(task: str):
    """Errors about a run name this command's option, not that of commands for one run."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--workdir=", f"--{task}=")) from error


def _seeds(folder: Path) -> list[Path]:
    """The workdirs of an arm, in the order of their seeds."""
    return sorted((path for path in folder.glob("seed-*") if SEED.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("seed-"))
