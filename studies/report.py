"""Tables and plots of the study, from the workdirs of its three sweeps.

    python -m studies.report --sorting=runs/study/sorting --pair=runs/study/pair --out=docs/study

Writes OUT/sorting_runs.csv, OUT/sorting_rescale_runs.csv and OUT/pair_runs.csv (every evaluation of every
run), OUT/sorting_rollouts.csv (every logged rollout of the sorting task's `release` arm), OUT/*.svg, and
prints the tables. --sorting=, --sorting_rescale= or --pair= with nothing after it leaves that sweep out, and
its files as they are; without --sorting there is no --sorting_rescale either.
"""

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from opd_jax import config
from opd_jax.errors import UserError
from opd_jax.run import make_folder
from studies import releases, runs, tables

GRID = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd"}
KL = {"kl": "held-out KL, nats/token"}
# Task -> the columns that its tables and curves are of, and their names.
SHOWN = {
    "sorting": {"accuracy": "accuracy, share of problems"} | KL,
    "pair": KL | {"teacher_logp": "teacher's log-probability, nats/token"},
}
# Okabe and Ito's colours, which the colour-blind tell apart; marks besides, and dashes from the second round.
COLOURS = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
MARKS = ("o", "s", "^", "D", "v")


def draw(out: Path, name: str, size, fill) -> None:
    """Saves OUT/NAME.svg of a figure that fill(axes list) draws."""
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 9, "svg.fonttype": "none", **GRID}):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})


def curves(figure, rows, shown: Mapping[str, str]) -> None:
    """Each quantity against steps and against supervised tokens, a line an arm, mean over seeds."""
    panels = figure.subplots(len(shown), 2, sharey="row", sharex="col")
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        steps = sorted({row["step"] for row in rows if row["arm"] == arm})
        points = [[r for r in rows if r["arm"] == arm and r["step"] == step] for step in steps]
        tokens = [np.mean([row["supervised_tokens"] for row in point]) / 1000 for point in points]
        for (left, right), quantity in zip(panels, shown, strict=True):
            means = [np.mean([row[quantity] for row in point]) for point in points]
            left.plot(steps, means, label=arm, **look(number))
            right.plot(tokens, means, **look(number))
    for (left, _), label in zip(panels, shown.values(), strict=True):
        left.set(ylabel=label)
    panels[-1, 0].set(xlabel="step")
    panels[-1, 1].set(xlabel="supervised tokens, thousands")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def look(number: int) -> dict[str, Any]:
    """The line of arm `number`: a colour, a mark and a dash pattern, no two alike for 40 arms.

    The reference, which is the first, and the paper's rule, the second, are the heaviest.
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": ("-", "--")[number >= len(COLOURS)],
        "linewidth": 1.8 if number < 2 else 1.0,
        "markersize": 4,
    }


def rescale_figure(figure, rows, without, shown: Mapping[str, str]) -> None:
    """What leaving the rescale out changes, a panel a quantity: a rule's mean over seeds and 95% interval."""
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (quantity, label) in zip(panels, shown.items(), strict=True):
        found = tables.rescaled(rows, without, quantity)
        at = range(len(found))
        for number, name in enumerate(("less", "less_full")):
            means = np.array([row[name] for row in found])
            ends = np.array([row[f"{name}_interval"] for row in found]).T
            style = look(number) | {"linestyle": "none", "capsize": 3}
            compared = ("the same with it", "full supervision")[number]
            heights = [place + 0.2 * number for place in at]
            axes.errorbar(means, heights, xerr=np.abs(ends - means), label=f"minus {compared}", **style)
        axes.set_yticks(at, [row["arm"] for row in found])
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=f"difference of {label}")
    panels[0].invert_yaxis()
    panels[0].set(ylabel="rule, without the rescale")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def draw_releases(out: Path, logged) -> None:
    """The plots of the sorting task's rollouts; removes one that has nothing to show, as another sweep's."""
    margins = releases.margins_around_errors(logged)
    released = [row for row in logged if row["accepted"] and row["first_error"] is not None]
    shares = releases.shares(logged)
    draw(out, "sorting_shares", (5, 3.2), lambda figure: releases.shares_figure(figure, shares))
    draw(out, "sorting_margin", (5, 3.2), lambda figure: releases.margin_figure(figure, margins))
    if released:
        draw(out, "sorting_release", (5, 3.2), lambda figure: releases.release_figure(figure, released))
    else:
        (out / "sorting_release.svg").unlink(missing_ok=True)


def main(_):
    out = Path(flags.FLAGS.out)
    names = [*SHOWN, "sorting_rescale"] if flags.FLAGS.sorting else ["pair"]
    sweeps = {name: Path(flags.FLAGS[name].value) for name in names if flags.FLAGS[name].value}
    if not sweeps:
        raise UserError("--sorting= and --pair= leave nothing to report; give at least one sweep's folder")
    evaluated = {name: runs.read_sweep(name, folder) for name, folder in sweeps.items()}
    logged = runs.read_rollouts(sweeps["sorting"]) if "sorting" in sweeps else []
    without = evaluated.get("sorting_rescale", [])
    compared = {
        label: tables.rescaled(evaluated["sorting"], without, quantity)
        for quantity, label in SHOWN["sorting"].items()
        if without
    }
    make_folder(out)
    for name, rows in evaluated.items():
        _write_csv(out / f"{name}_runs.csv", rows)
        for quantity, label in SHOWN.get(name, {}).items():
            print(f"\n{name}: {label}\n{tables.markdown(tables.table(rows, quantity), label)}")
        if name in SHOWN:
            fill = functools.partial(curves, rows=rows, shown=SHOWN[name])
            draw(out, f"{name}_curves", (8, 6), fill)
    for label, rows in compared.items():
        print(f"\nsorting, the rescale: {label}\n{tables.rescaled_markdown(rows, label)}")
    if without:
        fill = functools.partial(
            rescale_figure, rows=evaluated["sorting"], without=without, shown=SHOWN["sorting"]
        )
        draw(out, "sorting_rescale", (8, 3.4), fill)
    if logged:
        draw_releases(out, logged)
        flat = [row | {"margins": " ".join(f"{m:.3f}" for m in row["margins"])} for row in logged]
        _write_csv(out / "sorting_rollouts.csv", flat)
        found = releases.margin_table(releases.margins_around_errors(logged))
        print(f"\nmargins around the first error\n{found}\n\n{releases.summary(logged)}")


def _write_csv(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


if __name__ == "__main__":
    flags.DEFINE_string("sorting", "runs/study/sorting", "The sweep of configs/study/sorting.py.")
    flags.DEFINE_string(
        "sorting_rescale", "runs/study/sorting_rescale", "The sweep of configs/study/sorting_rescale.py."
    )
    flags.DEFINE_string("pair", "runs/study/pair", "The sweep of configs/study/pair.py.")
    flags.DEFINE_string("out", "docs/study", "Where the CSV files and plots go.")
    config.run(main)
