"""The table and the page of a sweep, from what its runs have written."""

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import compare, estimates, report, report_figures
from opd_jax.arms import Planned
from opd_jax.compare import Measured
from opd_jax.run_record import Run, column, phase_seconds, read_run

SECONDS = ("sample", "train", "data", "other")
NOTE = """\
KL: KL(student ‖ teacher) on held-out prompts after the last step, nats a token, mean over seeds. Its 95%
interval is Student's over seeds where an arm has two or more, else the bootstrap's over prompts. Difference:
the arm less the one it is compared with (the first, or the first of its group) on the same prompts and seeds,
with its 95% bootstrap interval over prompts and the p-value of a paired permutation test, uncorrected for the
number of arms. Accuracy of benchmarks likewise. Supervised: tokens in the loss, mean over seeds. Seconds a
step: medians, without the first step."""


def write(runs: Sequence[Planned], out: Path) -> str:
    """Writes OUT/table.csv, OUT/table.md and OUT/report.html; returns the Markdown and where it is."""
    rows = table(runs)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = f"{markdown(rows)}\n\n{NOTE}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    first_seed = {planned.arm: planned for planned in reversed(runs)}
    shown = [first_seed[row["arm"]] for row in rows]
    page = report.build(
        [planned.workdir for planned in shown],
        out / "report.html",
        titles=[planned.arm for planned in shown],
        lead=_figures(rows) + f"<p>{html.escape(NOTE)} Below: the first seed of each arm.</p>",
    )
    return f"{text}\ntable    {out / 'table.md'}, {out / 'table.csv'}\nreport   {page}"


def table(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """One row an arm: column -> number or text, in the order of the arms."""
    by_arm: dict[str, dict[int, Path]] = {}
    against = {planned.arm: planned.against for planned in runs}
    for planned in runs:
        by_arm.setdefault(planned.arm, {})[planned.seed] = planned.workdir
    found = {
        arm: {seed: compare.measured(workdir) for seed, workdir in seeds.items()}
        for arm, seeds in by_arm.items()
    }
    return [_row(arm, seeds, found[arm], found.get(against[arm], {})) for arm, seeds in by_arm.items()]


def _row(
    arm: str,
    workdirs: Mapping[int, Path],
    found: Mapping[int, Mapping[str, Measured]],
    other: Mapping[int, Mapping[str, Measured]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "seeds": len(workdirs)}
    names = sorted({name for measured in found.values() for name in measured}, key=lambda n: (n != "KL", n))
    for name in names:
        seeds = [seed for seed in found if name in found[seed]]
        values = [found[seed][name].value for seed in seeds]
        whole = _together([found[seed][name] for seed in seeds])
        if len(values) > 1:
            low, high = estimates.seed_interval(values)
        else:
            low, high = estimates.bootstrap_ratio(whole.total_N, whole.count_N)
        row |= {name: float(np.mean(values)), f"{name} low": low, f"{name} high": high}
        shared = [seed for seed in seeds if name in other.get(seed, {})]
        if shared and found is not other:
            ours, theirs = (_together([part[seed][name] for seed in shared]) for part in (found, other))
            if ours.text_N == theirs.text_N:
                change = estimates.paired(theirs.total_N, theirs.count_N, ours.total_N, ours.count_N)
                parts = zip(("", " low", " high", " p"), change)
                row |= {f"{name} difference{part}": value for part, value in parts}
    records = [read_run(workdir) for workdir in workdirs.values()]
    return row | _trained(records)


def _together(measured: Sequence[Measured]) -> Measured:
    """Sums over seeds, problem by problem."""
    return Measured(
        sum(m.total_N for m in measured), sum(m.count_N for m in measured), measured[0].text_N
    )


def _trained(records: Sequence[Run]) -> dict[str, Any]:
    supervised, written = (
        np.mean([sum(column(record.train, name)[1]) for record in records])
        for name in ("supervised_tokens", "response_tokens")
    )
    row = {"supervised tokens": float(supervised), "supervised share": float(supervised / written)}
    evals = [record.evals[-1] for record in records if record.evals]
    if evals:
        row["response length"] = float(np.mean([line["response_length"] for line in evals]))
        row["finished share"] = float(np.mean([line["finished_share"] for line in evals]))
    phases = [phase_seconds(record) for record in records]
    for name in SECONDS:
        values = [seconds[name] for seconds in phases if name in seconds]
        if values:
            row[f"seconds {name}"] = float(np.mean(values))
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, intervals beside their values."""
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


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """A plot of the arms for each quantity that has an interval."""
    columns = dict.fromkeys(key for row in rows for key in row)
    lows = [key for key in columns if key.endswith(" low") and not key.endswith(" difference low")]
    names = [key.removesuffix(" low") for key in lows]
    plots = []
    for name in names:
        unit = "held-out KL(student ‖ teacher), nats/token" if name == "KL" else f"accuracy on {name}"
        shown = [(i, row) for i, row in enumerate(rows) if name in row]
        svg = report_figures.intervals(
            unit,
            [row["arm"] for _, row in shown],
            [(row[name], row[f"{name} low"], row[f"{name} high"]) for _, row in shown],
            [i for i, _ in shown],
        )
        plots.append(f"<figure><h3>{html.escape(unit)}</h3>{svg}</figure>")
    return f'<section><h2>The arms</h2><div class="panels">{"".join(plots)}</div></section>'
