"""What a workdir says about its run: the records as Python values, and one run in one row.

Reads what `metrics.py` writes, also while the run goes on, and imports no JAX.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.errors import UserError

PHASES = ("sample", "train", "data")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one workdir holds; `train`, `evals` and `alarms` are the lines of metrics.jsonl by their kind."""

    title: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    prompts: Mapping[str, int]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]

    @property
    def rule(self) -> str:
        return str(self.config.get("release", {}).get("rule", "unknown"))


def read_run(workdir: str | Path, title: str | None = None) -> Run:
    """Reads a workdir.

    Raises:
      UserError: there is no metrics.jsonl, or nothing in it yet.
    """
    workdir = Path(workdir)
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no metrics.jsonl; name the folder of a training run")
    records = read_lines(path)
    train = [record for record in records if record.get("kind") == "train"]
    evals = [record for record in records if record.get("kind") == "eval"]
    if not train and not evals:
        raise UserError(f"--workdir={workdir}: metrics.jsonl holds no step yet; try again later")
    return Run(
        title=title or workdir.resolve().name,
        config=read_config(workdir) or {},
        versions=read_object(workdir / "versions.json") or {},
        prompts=read_object(workdir / "prompts.json") or {},
        train=train,
        evals=evals,
        alarms=[record for record in records if record.get("kind") == "alarm"],
        rollouts=read_lines(workdir / "rollouts.jsonl"),
    )


def read_config(workdir: str | Path) -> dict[str, Any] | None:
    """The config.json of a workdir; None where there is none.

    Raises:
      UserError: it is damaged.
    """
    return read_object(Path(workdir) / "config.json")


def has_steps(workdir: str | Path) -> bool:
    """Whether a workdir holds a step: a checkpoint, whole or damaged, or the record of one."""
    workdir = Path(workdir)
    saved = (path for name in ("checkpoints", "damaged_checkpoints") for path in (workdir / name).glob("*"))
    if any(path.name.isdigit() for path in saved):
        return True
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return any('"kind": "train"' in line for line in file)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file of a workdir; None where there is none.

    Raises:
      UserError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise UserError(
            f"{path} is not readable as JSON ({error}); restore it, or start in another --workdir"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; restore it, or start in another --workdir")
    return found


def summary(run: Run) -> dict[str, str]:
    """One run in one row: column -> text."""
    tokens = sum(column(run.train, "response_tokens")[1])
    supervised = sum(column(run.train, "supervised_tokens")[1])
    accepted = column(run.train, "accepted_share")[1]
    seconds = phase_seconds(run)
    speed = column(run.train[1:] or run.train, "tokens_per_second")[1]
    return {
        "Run": run.title,
        "Rule": run.rule,
        "Steps": f"{max((line['step'] for line in run.train), default=0):,}",
        "Prompts: train, held out; left out": _prompts(run.prompts),
        "Held-out KL, nats/token": _held_out(run.evals),
        "Sampled KL, nats/token": _first_and_last_tenth(column(run.train, "kl")[1]),
        "Supervised tokens": f"{supervised:,.0f} ({supervised / tokens:.0%})" if tokens else "–",
        "Releases accepted": f"{np.mean(accepted):.0%}" if accepted else "–",
        "Seconds a step: sample, train, data": (
            ", ".join(f"{seconds[name]:.3g}" if name in seconds else "–" for name in PHASES)
        ),
        "Tokens/s": f"{np.median(speed):,.0f}" if speed else "–",
    }


def column(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a number under `key`."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def phase_seconds(run: Run) -> dict[str, float]:
    """Median seconds a step of each phase, and "other"; without the first step, which compiles."""
    lines = run.train[1:] or run.train
    seconds = {}
    for phase in PHASES:
        values = column(lines, f"seconds_{phase}")[1]
        if values:
            seconds[phase] = float(np.median(values))
    whole = column(lines, "seconds_step")[1]
    if whole:
        seconds["other"] = max(0.0, float(np.median(whole)) - sum(seconds.values()))
    return seconds


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Config keys in which the runs differ -> the value of each run."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = sorted(set().union(*flat))
    rows = {key: [json.dumps(config[key]) if key in config else "–" for config in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _prompts(counts: Mapping[str, int]) -> str:
    if not counts:
        return "–"
    left_out = f"{counts['over_long']:,} too long, {counts['repeated']:,} repeated"
    return f"{counts['train']:,}, {counts['heldout']:,}; {left_out}"


def _held_out(evals: Sequence[Mapping[str, Any]]) -> str:
    measured = [line for line in evals if line.get("kl") is not None]
    if not measured:
        return "not measured"
    texts = []
    for line in (measured[0], measured[-1])[: len(measured)]:
        low, high = line.get("kl_low"), line.get("kl_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        texts.append(f"{line['kl']:.3f}{interval}")
    return " → ".join(texts)


def _first_and_last_tenth(values: Sequence[float]) -> str:
    if not values:
        return "–"
    tenth = max(1, len(values) // 10)
    return f"{np.mean(values[:tenth]):.3f} → {np.mean(values[-tenth:]):.3f}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, without a last line that is still being written; [] where there is no file.

    Raises:
      UserError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON ({error}); fix it") from error
    return records
