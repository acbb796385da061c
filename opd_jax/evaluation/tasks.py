"""Benchmarks: problems with reference answers, from user files, reasoning-gym and champ-dataset.

A benchmark is named in one of three ways:

- NAME:FILE. tasks.json defines the columns of known benchmarks; any other NAME needs the columns prompt,
  question or problem, and answer.
- rg:TASK or rg:TASK:COUNT. reasoning-gym generates the problems and grades the answers.
- champ. 270 competition problems of the package champ-dataset.
"""

import dataclasses
import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

from opd_jax.data.prompts import QUESTION_COLUMNS, generate, records
from opd_jax.errors import UserError
from opd_jax.evaluation import answers

DEFINITIONS_FILE = Path(__file__).with_name("tasks.json")
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and end with the letter of the right choice within \\boxed{}."
TAGGED = "Give your final answer between <answer> and </answer>."
GENERATED = 100
GENERATOR_SEED = 1_000_003  # differs from the default seed of training data
LETTERS = "ABCDEFGHIJ"
NAME = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      question: the problem's own text.
      text: the prompt: question, choices and instruction.
      answer: the reference answer.
      generator: (task, size, seed, index) of a reasoning-gym generator whose scorer grades, else None.
    """

    question: str
    text: str
    answer: str
    generator: tuple[str, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of problems.

    Attributes:
      name: fit for a file name.
      problems: in the order of their file or generator.
      samples: responses to each problem that published results usually average.
    """

    name: str
    problems: tuple[Problem, ...]
    samples: int


def load(spec: str, key: str = "eval.benchmark") -> Benchmark:
    """Reads the benchmark that `spec` names.

    Raises:
      UserError: the name is unknown, or the file cannot be read or lacks a column.
    """
    name, _, rest = spec.partition(":")
    if name == "rg":
        return _generated(rest, f"{key}={spec}")
    if spec == "champ":
        return _champ(key)
    definitions = json.loads(DEFINITIONS_FILE.read_text(encoding="utf-8"))
    if not NAME.fullmatch(name):
        raise UserError(f"{key}={spec}: {name!r} names files; use letters, digits and any of _ . + - alone")
    if not rest:
        known = ", ".join([*(f"{n}:FILE" for n in definitions), "champ", "rg:TASK", "heldout"])
        raise UserError(f"{key}={spec}: name the file of its problems; write one of {known}")
    definition = definitions.get(name, {"prompt": QUESTION_COLUMNS, "answer": ["answer"], "samples": 1})
    rows = records.read(rest, f"{key}={name}")
    problems = tuple(_problem(definition, row, n, f"{key}={spec}") for n, row in enumerate(rows))
    return Benchmark(name, problems, definition["samples"])


def _problem(definition: dict[str, Any], row: dict[str, Any], number: int, where: str) -> Problem:
    text = records.first_field(row, definition["prompt"])
    answer = records.first_field(row, definition["answer"])
    wrong = [records.field(row, column) for column in definition.get("wrong", ())]
    if text is None or answer is None or None in wrong:
        wanted = [" or ".join(definition[part]) for part in ("prompt", "answer")]
        wanted += definition.get("wrong", [])
        raise UserError(f"{where}: record {number} needs {', '.join(wanted)}; it has {', '.join(row)}")
    text, answer = str(text).strip(), str(answer).strip()
    if wrong:
        # The order of the choices depends only on the question.
        choices = [answer, *(str(choice).strip() for choice in wrong)]
        order = random.Random(text).sample(range(len(choices)), len(choices))
        listed = "\n".join(f"({LETTERS[i]}) {choices[n]}" for i, n in enumerate(order))
        return Problem(text, f"{text}\n\n{listed}\n\n{LETTER}", LETTERS[order.index(0)])
    return Problem(text, f"{text}\n\n{BOXED}", answers.reference(answer))


def _generated(rest: str, where: str) -> Benchmark:
    task, _, count = rest.partition(":")
    if count and (not count.isdigit() or int(count) < 1):
        raise UserError(f"{where}: {count!r} is no number of problems; write rg:TASK:100")
    size = int(count or GENERATED)
    problems = tuple(
        Problem(question, f"{question}\n\n{TAGGED}", answer, (task, size, GENERATOR_SEED, index))
        for index, (question, answer) in enumerate(generate(task, size, GENERATOR_SEED, where))
    )
    return Benchmark(f"rg_{task}", problems, 1)


def _champ(key: str) -> Benchmark:
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{key}=champ: the package champ-dataset is missing; pip install --no-deps champ-dataset"
        )
    # Only the file is read: importing the package would need more packages.
    path = Path(spec.submodule_search_locations[0]) / "dataset_files" / "v0.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["problems"].values()
    answered = (row for row in rows if row["_answer"])
    problems = tuple(Problem(row["_text"], f"{row['_text']}\n\n{BOXED}", row["_answer"]) for row in answered)
    return Benchmark("champ", problems, 1)
