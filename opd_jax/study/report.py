"""Tables and plots of the study, from the workdirs of its two sweeps.

    python -m opd_jax.study.report --sorting=runs/study/sorting --pair=runs/study/pair --out=docs/study

Writes OUT/sorting_runs.csv and OUT/pair_runs.csv (every evaluation of every run), OUT/sorting_rollouts.csv
(every logged rollout of the sorting task's `release` arm), OUT/*.svg, and prints the tables. --sorting= or
--pair= with nothing after it leaves that task out, and its files as they are.
"""

import contextlib
import csv
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from opd_jax import config
from opd_jax.compare import read_lines
from opd_jax.errors import UserError
from opd_jax.estimates import seed_interval
from opd_jax.outputs import make_folder
from opd_jax.run_record import read_run
from opd_jax.study import sorting

QUESTION = re.compile(r"Sort [\d ]+ (?:upwards|downwards)\.")
SEED = re.compile(r"seed-\d+")
OFFSETS = range(-4, 5)
GRID = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd"}
KL = {"kl": "held-out KL, nats/token"}
# Task -> the columns that its tables and curves are of, and their names.
SHOWN = {
    "sorting": {"accuracy": "accuracy, share of problems"} | KL,
    "pair": KL | {"teacher_logp": "teacher's log-probability, nats/token"},
}
EXCHANGES = 200
# Okabe and Ito's colours, which the colour-blind tell apart; marks besides, and dashes from the second round.
COLOURS = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
MARKS = ("o", "s", "^", "D", "v")


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


def table(rows: Sequence[Mapping[str, Any]], quantity: str) -> list[dict[str, Any]]:
    """One row an arm: the quantity after the last step, and its differences to `full`, over seeds.

    `at equal tokens` compares with full supervision at the number of supervised tokens that the arm used,
    on the line through full's evaluations. Intervals are Student's at 95% over seeds.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    curves: dict[tuple[str, int], list] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        curves.setdefault((row["arm"], row["seed"]), []).append(row)
    found = []
    for arm in arms:
        seeds = [seed for name, seed in curves if name == arm]
        ends = {seed: curves[arm, seed][-1] for seed in seeds}
        values = [ends[seed][quantity] for seed in seeds]
        row = {"arm": arm, "seeds": len(seeds), "value": np.mean(values), "interval": _interval(values)}
        row["supervised_share"] = np.mean(
            [ends[seed]["supervised_tokens"] / ends[seed]["response_tokens"] for seed in seeds]
        )
        if arm != arms[0]:
            steps, tokens = [], []
            for seed in seeds:
                full = curves[arms[0], seed]
                used = [point["supervised_tokens"] for point in full]
                at = np.interp(ends[seed]["supervised_tokens"], used, [point[quantity] for point in full])
                steps.append(ends[seed][quantity] - full[-1][quantity])
                tokens.append(ends[seed][quantity] - at)
            row |= {"steps": np.mean(steps), "steps_interval": _interval(steps)}
            row |= {"tokens": np.mean(tokens), "tokens_interval": _interval(tokens)}
        found.append(row)
    return found


def markdown(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """`table` as Markdown."""
    lines = [
        f"| arm | {name} | less full, equal steps | less full, equal supervised tokens | supervised |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["arm"], f"{row['value']:.3f} {_span(row['interval'])}"]
        for kind in ("steps", "tokens"):
            known = kind in row
            cells.append(f"{row[kind]:+.3f} {_span(row[kind + '_interval'], '+')}" if known else "–")
        lines.append(f"| {' | '.join(cells)} | {row['supervised_share']:.0%} |")
    return "\n".join(lines)


def margins_around_errors(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float, int]]:
    """Offset from the first wrong sentence -> (mean M there, mean M of right responses there, responses).

    The right responses' mean is over the sentences with the same number, weighted as the wrong ones have
    them, so that a change of M along any response does not look like one after an error.
    """
    right: dict[int, list[float]] = {}
    for row in rows:
        if row["first_error"] is None:
            for number, margin in enumerate(row["margins"]):
                right.setdefault(number, []).append(margin)
    found = {}
    for offset in OFFSETS:
        pairs = []
        for row in rows:
            number = (row["first_error"] if row["first_error"] is not None else -99) + offset
            if 0 <= number < len(row["margins"]) and number in right:
                pairs.append((row["margins"][number], np.mean(right[number])))
        if pairs:
            wrong_mean, right_mean = np.mean(pairs, axis=0)
            found[offset] = float(wrong_mean), float(right_mean), len(pairs)
    return found


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


def _margin_figure(figure, found) -> None:
    axes = figure.subplots()
    offsets = list(found)
    axes.plot(offsets, [found[k][0] for k in offsets], marker="o", label="responses with an error")
    label = "right responses, same sentence numbers"
    axes.plot(offsets, [found[k][1] for k in offsets], marker="s", label=label)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="sentences after the first wrong one", ylabel="teacher margin M, nats")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def _release_figure(figure, released) -> None:
    axes = figure.subplots()
    distance = np.array([row["kept"] - row["first_error"] for row in released])
    chance = _exchanged(released)
    edges = np.arange(min(distance.min(), chance.min()) - 0.5, max(distance.max(), chance.max()) + 1)
    axes.hist(distance, bins=edges, edgecolor="white", label="as released")
    share = np.histogram(chance, edges)[0] / EXCHANGES
    axes.stairs(share, edges, color="black", linewidth=1.4, label="release points exchanged")
    axes.set(xlabel="first released sentence less first wrong one", ylabel="responses")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def read_sweep(task: str, folder: Path) -> list[dict[str, Any]]:
    """`evaluations` of every run of a sweep, arm by arm.

    Raises:
      UserError: the folder holds no run, none of the arm `full`, or one that has no evaluation yet or did
        not come as far as the others.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in _arms(folder):
        for path in _seeds(folder / arm):
            with _naming(task):
                rows = evaluations(path, arm, _number(path), task == "sorting")
            found[f"{arm}/{path.name}"] = rows
    if not found:
        raise UserError(
            f"--{task}={folder} holds no run of a sweep (ARM/seed-N); run configs/study/{task}.py there, or "
            f"leave the task out by --{task}="
        )
    if not any(run.startswith("full/") for run in found):
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


def main(_):
    out = Path(flags.FLAGS.out)
    sweeps = {task: Path(flags.FLAGS[task].value) for task in SHOWN if flags.FLAGS[task].value}
    if not sweeps:
        raise UserError("--sorting= and --pair= leave nothing to report; give at least one sweep's folder")
    evaluated = {task: read_sweep(task, folder) for task, folder in sweeps.items()}
    logged = read_rollouts(sweeps["sorting"]) if "sorting" in sweeps else []
    make_folder(out)
    for task, rows in evaluated.items():
        for quantity, label in SHOWN[task].items():
            print(f"\n{task}: {label}\n{markdown(table(rows, quantity), label)}")
        fill = functools.partial(curves, rows=rows, shown=SHOWN[task])
        draw(out, f"{task}_curves", (8, 6), fill)
        _write_csv(out / f"{task}_runs.csv", rows)
    if logged:
        found = margins_around_errors(logged)
        draw(out, "sorting_margin", (5, 3.2), lambda figure: _margin_figure(figure, found))
        if released := [row for row in logged if row["accepted"] and row["first_error"] is not None]:
            draw(out, "sorting_release", (5, 3.2), lambda figure: _release_figure(figure, released))
        else:
            (out / "sorting_release.svg").unlink(missing_ok=True)  # another sweep's
        flat = [row | {"margins": " ".join(f"{m:.3f}" for m in row["margins"])} for row in logged]
        _write_csv(out / "sorting_rollouts.csv", flat)
        print(f"\nmargins around the first error\n{_margin_table(found)}\n\n{_release_summary(logged)}")


def _margin_table(found) -> str:
    lines = ["| sentences after the first wrong one | M, wrong | M, right | responses |", "|---|---|---|---|"]
    lines += [f"| {k:+d} | {wrong:.2f} | {right:.2f} | {n} |" for k, (wrong, right, n) in found.items()]
    return "\n".join(lines)


def _release_summary(rows) -> str:
    wrong = [row for row in rows if row["first_error"] is not None]
    right = [row for row in rows if row["first_error"] is None]
    released = [row for row in wrong if row["accepted"]]
    both = np.array([row["kept"] - row["first_error"] for row in released])
    parts = [f"{len(rows)} rollouts, {len(wrong)} with an error"]
    for name, part in (("with an error", wrong), ("without", right)):
        if part:
            share = np.mean([row["accepted"] for row in part])
            parts.append(f"released {name}: {share:.0%}")
    if released:
        parts.append(
            f"first released less first wrong sentence: median {np.median(both):+.0f}, "
            f"from {np.percentile(both, 25):+.0f} to {np.percentile(both, 75):+.0f} (quartiles)"
        )
        at, far = np.mean(both == 0), np.mean(np.abs(both))
        (at_chance, at_p), (far_chance, far_p) = _by_chance(released)
        parts.append(
            f"released from the first wrong sentence on: {at:.0%}, {at_chance:.0%} by chance, p {at_p:.3f}; "
            f"mean distance {far:.2f} sentences, {far_chance:.2f} by chance, p {far_p:.3f} (release points "
            f"of these {len(released)} responses exchanged between those of as many sentences, {EXCHANGES} "
            "draws; p one-sided)"
        )
    return "; ".join(parts)


def _text(response: str) -> str:
    return response.removesuffix("<|end|>")


def _by_chance(rows) -> tuple[tuple[float, float], tuple[float, float]]:
    """(mean over `_exchanged` draws, p) of the share of releases at the first error and of the mean distance.

    p: the share of draws, the releases as they are counted among them, that are as near to the errors.
    """
    shares_N, distances_N = _nearness(_exchanged(rows))
    share, distance = _nearness(np.array([row["kept"] - row["first_error"] for row in rows]))
    near = shares_N >= share - 1e-9, distances_N <= distance + 1e-9  # sums in another order are as near
    p_share, p_distance = (float((1 + part.sum()) / (1 + EXCHANGES)) for part in near)
    return (float(shares_N.mean()), p_share), (float(distances_N.mean()), p_distance)


def _nearness(offsets) -> tuple[np.ndarray, np.ndarray]:
    """(share that are 0, mean magnitude) over the last axis."""
    return np.mean(offsets == 0, axis=-1), np.mean(np.abs(offsets), axis=-1)


def _exchanged(rows) -> np.ndarray:
    """First released less first wrong sentence [EXCHANGES, rows], with release points permuted, fixed seed.

    Release points move between responses of as many sentences only.
    """
    rng = np.random.default_rng(0)
    found = []
    for sentences in {row["sentences"] for row in rows}:
        same = [row for row in rows if row["sentences"] == sentences]
        kept, error = (np.array([row[key] for row in same]) for key in ("kept", "first_error"))
        found.append([rng.permutation(kept) - error for _ in range(EXCHANGES)])
    return np.concatenate(found, axis=1)


def _interval(values) -> tuple[float, float]:
    return seed_interval(values) if len(values) > 1 else (float("nan"), float("nan"))


def _span(interval, sign: str = "") -> str:
    return "" if np.isnan(interval[0]) else f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


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


def _write_csv(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


if __name__ == "__main__":
    flags.DEFINE_string("sorting", "runs/study/sorting", "The sweep of configs/study/sorting.py.")
    flags.DEFINE_string("pair", "runs/study/pair", "The sweep of configs/study/pair.py.")
    flags.DEFINE_string("out", "docs/study", "Where the CSV files and plots go.")
    config.run(main)
