"""Figures and tables of the longer run: text, margins and release points, early and late in training.

    python -m studies.longer --runs=runs/smollm2 --out=docs/smollm2

RUNS holds the sweep of configs/smollm2.py, and as arm "teacher" the run of configs/smollm2_teacher.py. Early
and late are the first and the last third of the steps. Writes OUT/quality.svg, OUT/margin.svg,
OUT/releases.svg and OUT/steps.csv, and prints the tables.
"""

import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.lines import Line2D

from opd_jax import config
from opd_jax.errors import UserError
from opd_jax.evaluation import bootstrap_ratio, read_lines
from opd_jax.release import change_point
from opd_jax.run import EVALUATIONS_FILE, Run, column, make_folder, read_run
from studies.report import draw

# Blue and vermilion of Okabe and Ito, which the colour-blind tell apart; markers and dashes besides.
LINES = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s", "linestyle": "--"})
REFERENCE = {"color": "black", "linestyle": ":"}
REFERENCE_ARM = "teacher"
GRAM = 3
SHUFFLES = 200
SMOOTH = 5  # steps of a running mean
# Held-out quantity of an evaluation -> its axis.
QUALITY = {
    "kl": "held-out KL, nats/token",
    "finished_share": "share of responses that end",
    "distinct": f"distinct {GRAM}-grams of words, share",
}
# Quantity of a training step -> its axis.
SAMPLED = {
    "teacher_logp": "teacher's log-probability, nats/token",
    "stop_probability": "student's probability of ending",
    "accepted_share": "share of responses released",
}
STEP_COLUMNS = ("step", "kl", "teacher_logp", "contrast", "accepted_share", "release_position", "gain")
STEP_COLUMNS += ("finished_share", "response_length", "stop_probability", "teacher_stop_probability")


def distinct(text: str, n: int = GRAM) -> float:
    """Share of the n-grams of a text's words that are not repetitions of an earlier one; NaN where none is.

    Source: distinct-n of Li et al. 2016 (arXiv 1510.03055), of each response by itself.
    """
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else float("nan")


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Each evaluation of a run: step, kl, kl_low, kl_high, and the other quantities of QUALITY."""
    responses: dict[int, list[str]] = {}
    for row in read_lines(workdir / EVALUATIONS_FILE):
        responses.setdefault(row["step"], []).append(row["response"])
    return [
        line | {"distinct": float(np.nanmean([distinct(text) for text in responses[line["step"]]]))}
        for line in read_run(workdir).evals
    ]


def windows(run: Run) -> dict[str, list[int]]:
    """ "early" and "late" -> their steps, a third of the run's each; "all" of the teacher's run."""
    steps = [line["step"] for line in run.train]
    third = len(steps) // 3
    if run.title == REFERENCE_ARM:
        return {"all": steps}
    return {"early": steps[:third], "late": steps[-third:]}


def margins(run: Run, steps: Sequence[int]) -> np.ndarray:
    """The teacher's margin along the response, nats, [bins, 3]: mean, 95% bootstrap interval over steps."""
    lines = [line for line in run.train if line["step"] in steps]
    names = "position_contrast_sum", "position_tokens"
    total, count = (np.array([line[name] for line in lines]) for name in names)
    return np.array([(t.sum() / c.sum(), *bootstrap_ratio(t, c)) for t, c in zip(total.T, count.T)])


def released(run: Run, steps: Sequence[int]) -> dict[str, Any]:
    """What the rule did with the responses of some steps.

    Returns:
      responses, sentences (mean a response), accepted (share of responses that are released), shuffled (the
      share expected if each response's sentences stood in random order), position_N (share of its tokens that
      each released response keeps).
    """
    found = [record for record in run.rollouts if record["step"] in steps]
    scores = [np.log1p([sentence["contrast"] for sentence in record["sentences"]]) for record in found]
    return {
        "responses": len(found),
        "sentences": float(np.mean([len(score_N) for score_N in scores])),
        "accepted": float(np.mean([record["accepted"] for record in found])),
        "shuffled": accepted_when_shuffled(scores, run.config["release"]["min_segments"]),
        "position_N": np.array([r["kept_tokens"] / r["tokens"] for r in found if r["accepted"]]),
    }


def accepted_when_shuffled(scores: Sequence[np.ndarray], min_segments: int) -> float:
    """Share of responses in which the rule accepts a drop of the same sentence scores in random order."""
    rng = np.random.default_rng(0)
    width = max(map(len, scores))
    valid_BN = np.array([np.arange(width) < len(score_N) for score_N in scores])
    shuffled = [
        np.pad(rng.permutation(score_N), (0, width - len(score_N)))
        for _ in range(SHUFFLES)
        for score_N in scores
    ]
    decide = jax.jit(functools.partial(change_point, min_segments=min_segments))
    score_BN = np.array(shuffled, np.float32)
    return float(decide(score_BN, np.tile(valid_BN, (SHUFFLES, 1))).accepted_B.mean())


def quality_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Arm -> its evaluations, as Markdown."""
    lines = ["| arm | step | KL, nats/token | ends | tokens | distinct |", "|---|---|---|---|---|---|"]
    for arm, rows in found.items():
        lines += [
            f"| {arm} | {row['step']} | {row['kl']:.3f} [{row['kl_low']:.3f}, {row['kl_high']:.3f}] "
            f"| {row['finished_share']:.0%} | {row['response_length']:.0f} | {row['distinct']:.2f} |"
            for row in rows
        ]
    return "\n".join(lines)


def window_table(runs: Sequence[Run]) -> str:
    """What differs between early and late in each run, as Markdown."""
    lines = [
        "| arm | steps | sampled KL | teacher's log-probability | margin M: first, last third | released "
        "| released if shuffled | kept of released: quartiles | sentences |",
        f"|{'---|' * 9}",
    ]
    for run in runs:
        for steps in windows(run).values():
            rows = [line for line in run.train if line["step"] in steps]
            tokens = np.array([line["response_tokens"] for line in rows])
            kl, logp = (np.average(column(rows, name)[1], weights=tokens) for name in ("kl", "teacher_logp"))
            ends = (thirds(rows, part) for part in (0, -1))
            part = released(run, steps)
            quartiles = np.percentile(part["position_N"], [25, 50, 75]) if len(part["position_N"]) else []
            cells = [run.title, f"{steps[0]}–{steps[-1]}", f"{kl:.3f}", f"{logp:.2f}"]
            cells += [", ".join(f"{x:.2f}" for x in ends), f"{part['accepted']:.0%} of {part['responses']}"]
            cells += [f"{part['shuffled']:.0%}", ", ".join(f"{x:.0%}" for x in quartiles) or "–"]
            lines.append(f"| {' | '.join([*cells, format(part['sentences'], '.1f')])} |")
    return "\n".join(lines)


def thirds(rows: Sequence[Mapping[str, Any]], part: int) -> float:
    """Mean margin, nats, over the first (0) or the last (-1) third of the positions of responses."""
    total, count = (sum(np.array(r[f"position_{name}"]) for r in rows) for name in ("contrast_sum", "tokens"))
    third = len(total) // 3
    inside = slice(None, third) if part == 0 else slice(-third, None)
    return float(total[inside].sum() / count[inside].sum())


def draw_quality(figure, found, runs, reference) -> None:
    """Held-out text over the steps (above); what is sampled in training, smoothed over five steps (below)."""
    above, below = figure.subplots(2, 3)
    for ax, (name, label) in zip(above, QUALITY.items()):
        for rows, style in zip(found.values(), LINES):
            error = None
            if name == "kl":
                error = np.abs([[row[key] - row["kl"] for row in rows] for key in ("kl_low", "kl_high")])
            ax.errorbar([r["step"] for r in rows], [r[name] for r in rows], error, capsize=3, **style)
        ax.set(xlabel="step", ylabel=label, ylim=(0, 1.2))
    for ax, (name, label) in zip(below, SAMPLED.items()):
        for run, style in zip(runs, LINES):
            steps, values = column(run.train, name)
            ax.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.5)
            middle = np.convolve(values, np.full(SMOOTH, 1 / SMOOTH), "valid")
            ax.plot(steps[SMOOTH // 2 : len(steps) - SMOOTH // 2], middle, markersize=3, **style)
        ax.axhline(np.mean(column(reference.train, name)[1]), **REFERENCE)
        ax.set(xlabel="step", ylabel=label)
    below[1].set_yscale("log")
    handles = [Line2D([], [], **style) for style in (*LINES[: len(found)], REFERENCE)]
    labels = [*found, "the teacher's own responses, mean"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def draw_margins(figure, runs, reference) -> None:
    """Margin along the response, early and late, a panel an arm."""
    for run, ax in zip(runs, figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]):
        for part, (window, steps), style in _parts(run, reference):
            mean, low, high = margins(part, steps).T
            place = (np.arange(len(mean)) + 0.5) / len(mean)
            ax.plot(place, mean, markersize=3, label=window, **style)
            ax.fill_between(place, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ax.set(title=run.title, xlabel="relative position in the response", xlim=(0, 1))
        ax.legend(frameon=False, loc="lower left")
    figure.axes[0].set(ylabel="teacher margin M, nats", ylim=(0, None))


def draw_releases(figure, runs, reference) -> None:
    """Share of all responses that are released, by where: early and late, a panel an arm."""
    edges = np.linspace(0, 1, 11)
    for run, ax in zip(runs, figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]):
        for part, (window, steps), style in _parts(run, reference):
            found = released(part, steps)
            share = np.histogram(found["position_N"], edges)[0] / found["responses"]
            look = {"color": style["color"], "linestyle": style.get("linestyle", "-")}
            label = f"{window}: {found['accepted']:.0%} released"
            ax.stairs(share, edges, linewidth=1.6, label=label, **look)
        ax.set(title=run.title, xlabel="share of the response's tokens before the cut", xlim=(0, 1))
        ax.legend(frameon=False, loc="upper right")
    figure.axes[0].set(ylabel="share of all responses", ylim=(0, 1.4 * figure.axes[0].get_ylim()[1]))


def _parts(run: Run, reference: Run):
    """(run, (name, steps), line style) of each curve in an arm's panel."""
    for (window, steps), style in zip(windows(run).items(), LINES):
        yield run, (f"{window}, steps {steps[0]} to {steps[-1]}", steps), style
    yield reference, ("the teacher's own responses", windows(reference)["all"]), REFERENCE


def main(_):
    out, folder = Path(flags.FLAGS.out), Path(flags.FLAGS.runs)
    workdirs = {path.parent.name: path for path in sorted(folder.glob("*/seed-0"))}
    if REFERENCE_ARM not in workdirs or len(workdirs) < 2:
        raise UserError(f"--runs={folder} lacks {REFERENCE_ARM}/seed-0 or the sweep's arms; run make smollm2")
    trained = [read_run(path, arm) for arm, path in workdirs.items() if arm != REFERENCE_ARM]
    reference = read_run(workdirs[REFERENCE_ARM], REFERENCE_ARM)
    found = {run.title: evaluations(workdirs[run.title]) for run in trained}
    make_folder(out)
    draw(out, "quality", (9, 5.4), lambda figure: draw_quality(figure, found, trained, reference))
    draw(out, "margin", (8, 3.6), lambda figure: draw_margins(figure, trained, reference))
    draw(out, "releases", (8, 3.6), lambda figure: draw_releases(figure, trained, reference))
    with (out / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("arm", *STEP_COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"arm": run.title} | line for run in (*trained, reference) for line in run.train)
    print(f"{quality_table(found)}\n\n{window_table([*trained, reference])}")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs/smollm2", "The sweep, and in it the teacher's run.")
    flags.DEFINE_string("out", "docs/smollm2", "Where figures and steps.csv go.")
    config.run(main)
