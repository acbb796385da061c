"""Compares two runs or models problem by problem: is the difference more than chance?"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd_jax.errors import UserError
from opd_jax.evaluation.estimates import Difference, paired

LEVEL = 0.05
# File names that answering.write gives: NAME-STEP or NAME-model, both optionally with -greedy.
RESULTS = re.compile(r"(?P<name>.+?)-(?P<label>\d+|model)(?P<greedy>-greedy)?")


class Measured(NamedTuple):
    """One quantity of one run, problem by problem.

    Attributes:
      total_N: sum over the problem's responses or tokens.
      count_N: number of responses or tokens.
      text_N: the problems' texts, which pair the problems of two runs.
    """

    total_N: np.ndarray
    count_N: np.ndarray
    text_N: list[str]

    @property
    def value(self) -> float:
        return float(self.total_N.sum() / self.count_N.sum())


def compare(a: str | Path, b: str | Path) -> dict[str, tuple[float, float, int, Difference]]:
    """name -> (value of a, value of b, number of problems, difference b - a); the KL is named "KL".

    Raises:
      UserError: one of them holds no results, they share none, or the problems differ.
    """
    found_a, found_b = measured(a), measured(b)
    for path, found in ((a, found_a), (b, found_b)):
        if not found:
            raise UserError(f"{path} holds no results; give a workdir, or what evaluate --out wrote")
    shared = [name for name in found_a if name in found_b]
    if not shared:
        raise UserError(
            f"{a} has {', '.join(found_a)} and {b} has {', '.join(found_b)}: nothing to compare; evaluate"
            " both on one benchmark"
        )
    result = {}
    for name in shared:
        one, two = found_a[name], found_b[name]
        if one.text_N != two.text_N:
            raise UserError(f"{name}: {a} and {b} were evaluated on different problems; evaluate one again")
        difference = paired(one.total_N, one.count_N, two.total_N, two.count_N)
        result[name] = one.value, two.value, len(one.text_N), difference
    return result


def measured(path: str | Path, step: int | None = None) -> dict[str, Measured]:
    """Results in a workdir, a folder of results or a results file: name -> results.

    Args:
      step: the step of the results; by default the newest results of each name.

    Raises:
      UserError: a file was not written by evaluate or a run.
    """
    path = Path(path)
    if path.is_file():
        return {_benchmark(path): _of(path, accuracy)}
    folder = path / "benchmarks" if (path / "benchmarks").is_dir() else path
    files = [file for file in folder.glob("*.jsonl") if RESULTS.fullmatch(file.stem)]
    if step is not None:
        files = [file for file in files if _step(file) == step]
    newest = {_benchmark(file): file for file in sorted(files, key=_step)}
    found = {name: _of(file, accuracy) for name, file in sorted(newest.items())}
    distances = _of(path / "evaluations.jsonl", lambda rows: _distance(rows, step))
    return found | ({} if distances is None else {"KL": distances})


def _of(path: Path, quantity: Callable[[list], Any]) -> Any:
    """Computes a quantity from the lines of a file.

    Raises:
      UserError: the lines are not results.
    """
    try:
        return quantity(read_lines(path))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is no file of results ({type(error).__name__}: {error}); give a workdir, or what"
            " evaluate --out wrote"
        ) from error


def _distance(rows: Sequence[Mapping[str, Any]], step: int | None) -> Measured | None:
    steps = {row["step"] for row in rows}
    wanted = max(steps, default=None) if step is None else step
    return kl([row for row in rows if row["step"] == wanted]) if wanted in steps else None


def accuracy(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """Numbers of right responses and of responses to each problem.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no line")
    rows = sorted(rows, key=lambda row: row["problem"])
    right = np.array([sum(row["right"]) for row in rows], float)
    return Measured(right, np.array([len(row["right"]) for row in rows], float), [r["text"] for r in rows])


def kl(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """Summed KL in nats, and number of tokens, of each held-out prompt."""
    rows = sorted(rows, key=lambda row: row["prompt"])
    tokens = np.array([row["tokens"] for row in rows], float)
    nats = np.array([row["kl"] for row in rows], float) * tokens
    return Measured(nats, tokens, [row["text"] for row in rows])


def statement(name: str, value_a: float, value_b: float, problems: int, difference: Difference) -> str:
    """The comparison as one sentence."""
    if name == "KL":
        numbers = f"{value_a:.4f} against {value_b:.4f} nats a token"
        change = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        better = difference.value < 0
    else:
        numbers = f"{value_a:.1%} against {value_b:.1%}"
        value, low, high = (100 * x for x in difference[:3])
        change = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
        better = difference.value > 0
    verdict = f"B is {'better' if better else 'worse'}" if difference.p < LEVEL else "not told apart"
    return f"{name}: {numbers}, B - A = {change}, p = {difference.p:.3g} over {problems} problems: {verdict}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; [] if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _benchmark(file: Path) -> str:
    match = RESULTS.fullmatch(file.stem)
    if match is None:
        return file.stem
    return match["name"] + (" (greedy)" if match["greedy"] else "")


def _step(file: Path) -> int:
    match = RESULTS.fullmatch(file.stem)
    return int(match["label"]) if match and match["label"].isdigit() else -1
