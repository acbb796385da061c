"""The table and the page of a sweep, from the files of its runs."""

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.evaluation import Measured, estimates
from opd_jax.evaluation import paired as compare
from opd_jax.report import build as report
from opd_jax.report import figures as report_figures
from opd_jax.run import Run, column, phase_seconds, read_run
from opd_jax.sweep.arms import Planned

START, TEACHER, MEAN = "start", "teacher", "mean"  # rows that are not arms, a column that is not a benchmark
SECONDS = ("sample", "train", "data", "other")
NOTE = """\
KL: KL(student ‖ teacher) on held-out prompts after the last step, nats a token, mean over seeds. Its 95%
interval is Student's over seeds where an arm has two or more, else the bootstrap's over prompts. Difference:
the arm less the one it is compared with (the first, or the first of its group) on the same prompts and seeds,
with its 95% bootstrap interval over prompts and the p-value of a paired permutation test, uncorrected for the
number of arms. Accuracy of benchmarks likewise, and its mean over benchmarks, each of which weighs the same.
Start: the student before its first step. Teacher: its answers to the benchmarks, drawn as the student's.
Supervised: tokens in the loss, mean over seeds. Seconds a step: medians, without the first step."""


def write(runs: Sequence[Planned], out: Path) -> str:
    """Writes OUT/table.csv, OUT/table.md and OUT/report.html; returns the Markdown and the paths."""
    rows = table(runs, out)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = f"{markdown(rows)}\n\n{NOTE}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    first_seed = {planned.arm: planned for planned in reversed(runs)}
    shown = [first_seed[arm] for arm in dict.fromkeys(planned.arm for planned in runs)]
    lead = _figures(rows, [planned.arm for planned in shown])
    page = report.build(
        [planned.workdir for planned in shown],
        out / "report.html",
        titles=[planned.arm for planned in shown],
        lead=f"{lead}<p>{html.escape(NOTE)} Below: the first seed of each arm.</p>",
    )
    return f"{text}\ntable    {out / 'table.md'}, {out / 'table.csv'}\nreport   {page}"


def table(runs: Sequence[Planned], out: Path) -> list[dict[str, Any]]:
    """One row per arm: column -> number or text, in the order of the arms.

    Rows of the start, one for each arm that others are compared with, come first. The teacher's row comes
    last, if OUT has its answers.
    """
    by_arm: dict[str, dict[int, Path]] = {}
    against = {planned.arm: planned.against for planned in runs}
    for planned in runs:
        by_arm.setdefault(planned.arm, {})[planned.seed] = planned.workdir
    found = {
        arm: {seed: compare.measured(workdir) for seed, workdir in seeds.items()}
        for arm, seeds in by_arm.items()
    }
    mean = runs[0].mean
    references = [arm for arm in dict.fromkeys(against.values()) if arm in by_arm]
    rows = []
    for arm in references:
        start = {seed: compare.measured(workdir, step=0) for seed, workdir in by_arm[arm].items()}
        row = _measured(START if len(references) == 1 else f"{START} of {arm}", start, {}, mean)
        if len(row) > 2:
            rows.append(row | _ended([read_run(workdir) for workdir in by_arm[arm].values()], first=True))
    for arm, workdirs in by_arm.items():
        row = _measured(arm, found[arm], found.get(against[arm], {}), mean)
        records = [read_run(workdir) for workdir in workdirs.values()]
        rows.append(row | _trained(records) | _ended(records) | _seconds(records))
    teacher = compare.measured(out / TEACHER)
    return rows + ([_measured(TEACHER, {0: teacher}, {}, mean)] if teacher else [])


def _measured(
    arm: str,
    found: Mapping[int, Mapping[str, Measured]],
    other: Mapping[int, Mapping[str, Measured]],
    mean: Sequence[str],
) -> dict[str, Any]:
    """The row of an arm, from the results of each seed, compared with another arm's results."""
    row: dict[str, Any] = {"arm": arm, "seeds": len(found)}
    names = sorted({name for measured in found.values() for name in measured}, key=lambda n: (n != "KL", n))
    for name in names:
        row |= _quantity(name, [name], found, other)
    averaged = list(mean) or [name for name in names if name != "KL"]
    if len(averaged) > 1 and set(averaged) <= set(names):
        row |= _quantity(MEAN, averaged, found, other)
    return row


def _quantity(
    column: str,
    names: Sequence[str],
    found: Mapping[int, Mapping[str, Measured]],
    other: Mapping[int, Mapping[str, Measured]],
) -> dict[str, float]:
    """The mean of the named results over seeds and names, its interval, and the difference from `other`."""
    seeds = [seed for seed in found if all(name in found[seed] for name in names)]
    if not seeds:
        return {}
    values = [np.mean([found[seed][name].value for name in names]) for seed in seeds]
    if len(values) > 1:
        low, high = estimates.seed_interval(values)
    else:
        whole = [_together([found[seed][name] for seed in seeds]) for name in names]
        low, high = estimates.bootstrap_mean([(w.total_N, w.count_N) for w in whole])
    row = {column: float(np.mean(values)), f"{column} low": low, f"{column} high": high}
    shared = [seed for seed in seeds if all(name in other.get(seed, {}) for name in names)]
    if shared and found is not other:
        ours, theirs = (
            [_together([part[seed][name] for seed in shared]) for name in names] for part in (found, other)
        )
        if [w.text_N for w in ours] == [w.text_N for w in theirs]:
            pairs = ([(w.total_N, w.count_N) for w in whole] for whole in (theirs, ours))
            parts = zip(("", " low", " high", " p"), estimates.paired_mean(*pairs))
            row |= {f"{column} difference{part}": value for part, value in parts}
    return row


def _together(measured: Sequence[Measured]) -> Measured:
    """Adds up the results of several seeds, problem by problem."""
    total_N, count_N = (np.sum(parts, axis=0) for parts in zip(*((m.total_N, m.count_N) for m in measured)))
    return Measured(total_N, count_N, measured[0].text_N)


def _trained(records: Sequence[Run]) -> dict[str, float]:
    supervised, written = (
        np.mean([sum(column(record.train, name)[1]) for record in records])
        for name in ("supervised_tokens", "response_tokens")
    )
    return {"supervised tokens": float(supervised), "supervised share": float(supervised / written)}


def _ended(records: Sequence[Run], first: bool = False) -> dict[str, float]:
    """Length and finished share of responses to held-out prompts, in the last or the first evaluation."""
    evals = [record.evals[0 if first else -1] for record in records if record.evals]
    names = {"response length": "response_length", "finished share": "finished_share"} if evals else {}
    return {column: float(np.mean([line[key] for line in evals])) for column, key in names.items()}


def _seconds(records: Sequence[Run]) -> dict[str, float]:
    row = {}
    phases = [phase_seconds(record) for record in records]
    for name in SECONDS:
        values = [seconds[name] for seconds in phases if name in seconds]
        if values:
            row[f"seconds {name}"] = float(np.mean(values))
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, with each interval next to its value."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    inner = (" low", " high", " p")
    heads = [key for key in columns if not key.endswith(inner) and not key.startswith("seconds ")]
    lines = [[*heads, "seconds: sample, train, data, other"]]
    for row in rows:
        cells = [_cell(row, key) for key in heads]
        cells.append(", ".join(f"{row[f'seconds {n}']:.3g}" for n in SECONDS if f"seconds {n}" in row))
        lines.append(cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    if f"{key} low" in row:
        percent = not key.startswith("KL")
        form = ".1%" if percent else ".4f"
        sign = "+" if key.endswith(" difference") else ""
        low, high = row[f"{key} low"], row[f"{key} high"]
        p = f", p = {row[f'{key} p']:.2g}" if f"{key} p" in row else ""
        return f"{value:{sign}{form}} [{low:{sign}{form}}, {high:{sign}{form}}]{p}"
    if key.endswith(" share"):
        return f"{value:.0%}"
    return f"{value:,.1f}" if key == "response length" else f"{value:,.0f}"


def _figures(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """One plot of all arms for each quantity that has an interval; start and teacher are in ink."""
    columns = dict.fromkeys(key for row in rows for key in row)
    lows = [key for key in columns if key.endswith(" low") and not key.endswith(" difference low")]
    names = [key.removesuffix(" low") for key in lows]
    number = {arm: i for i, arm in enumerate(arms)}
    plots = []
    for name in names:
        unit = "held-out KL(student ‖ teacher), nats/token" if name == "KL" else f"accuracy on {name}"
        unit = "mean accuracy over benchmarks" if name == MEAN else unit
        unit += "" if name == "KL" else ", share of responses right"
        shown = [row for row in rows if name in row]
        svg = report_figures.intervals(
            unit,
            [row["arm"] for row in shown],
            [(row[name], row[f"{name} low"], row[f"{name} high"]) for row in shown],
            [number.get(row["arm"]) for row in shown],
        )
        plots.append(f"<figure><h3>{html.escape(unit)}</h3>{svg}</figure>")
    return f'<section><h2>The arms</h2><div class="panels">{"".join(plots)}</div></section>'
