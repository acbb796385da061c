"""The HTML of a report: sections of tables, plots and rollouts.

The page loads nothing from elsewhere: plots are inline SVG. All text of models, prompts and configs is
escaped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.report import answers as report_answers
from opd_jax.report import canvas, figures, html, rollout_profiles
from opd_jax.report import gradient as report_gradient
from opd_jax.report import rollouts as report_rollouts
from opd_jax.report import stops as report_stops
from opd_jax.run import Run, alarms, column, differences, phase_seconds

STYLE_FILE = Path(__file__).with_name("report.css")
GRADIENT = "gradient norm, nats/token per unit of weight"
BINS = ("tokens", "contrast_sum", "advantage_sum", "advantage_sq_sum", "kept_tokens")


def render(
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, str]],
    answers: Sequence[Mapping[str, Any]],
    lead: str = "",
) -> str:
    """The whole page; `lead` is HTML that comes first."""
    sections = [
        lead,
        _alarms(runs),
        _summary(runs, rows),
        _progress(runs),
        _teachability(runs),
        _release(runs),
        report_stops.section(runs),
        report_gradient.section(runs),
        report_answers.section(runs),
        _health(runs),
        _time(runs),
        _rollouts(runs),
        _answers(answers),
        _provenance(runs),
    ]
    named = len(runs) <= 3
    title = escape(" · ".join(run.title for run in runs)) if named else f"{len(runs)} runs"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE_FILE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main><h1>On-policy distillation: {title}</h1>\n{''.join(sections)}</main></body>"
        "</html>\n"
    )


def _alarms(runs: Sequence[Run]) -> str:
    """The runs' alarms, one per line."""
    return "".join(
        f'<p class="warning">Alarm, {escape(run.title)}: {escape(alarms.text(alarm))}</p>'
        for run in runs
        for alarm in run.alarms
    )


def _summary(runs: Sequence[Run], rows: Sequence[Mapping[str, str]]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [(html.swatch(i) if key == "Run" else "") + escape(row.get(key, "–")) for key in head]
        for i, row in enumerate(rows)
    ]
    body = html.table([escape(key) for key in head], cells)
    body += (
        "<p>Held-out KL: first → last evaluation [95% interval over prompts]. Sampled KL: means of"
        " the first and the last tenth of the steps. Seconds and tokens/s: medians, without the"
        " first step, which compiles.</p>"
    )
    for run in runs:
        lost = [line["step"] for line in run.train if line.get("loss") is None]
        if lost:
            body += (
                f'<p class="warning">{escape(run.title)}: the loss is not finite in {len(lost)} of'
                f" {len(run.train)} steps, first in step {lost[0]}.</p>"
            )
    differing = differences(runs)
    if differing:
        table = html.table(
            ["Config key", *(html.swatch(i) + escape(run.title) for i, run in enumerate(runs))],
            [[f"<code>{escape(k)}</code>", *map(escape, row)] for k, row in differing.items()],
        )
        body += f"<details open><summary>Where the configs differ</summary>{table}</details>"
    return html.section("Summary", body)


def _progress(runs: Sequence[Run]) -> str:
    return html.section(
        "Does the student approach the teacher?",
        html.panels(
            runs,
            html.panel(
                "Divergence",
                figures.kl([column(run.train, "kl") for run in runs], [run.evals for run in runs]),
                "KL of student from teacher on the student's own text. Lower is closer. Faint:"
                " single steps; line: running mean.",
                "No KL was recorded.",
            ),
            html.panel(
                "Loss",
                html.curve(runs, "Loss over the steps", "loss, nats/token", "loss"),
                "The objective of each step. A policy-gradient loss follows the advantages that are"
                " kept, so compare it within a run.",
                "No loss was recorded.",
            ),
        ),
    )


def _teachability(runs: Sequence[Run]) -> str:
    def panel(title: str, unit: str, note: str, profile: Callable, **options: Any) -> str:
        svg = figures.position(title, unit, [position_profile(run, profile) for run in runs], **options)
        return html.panel(title, svg, note, "No profile over the position was recorded.")

    scores = [rollout_profiles.profile(run.rollouts, rollout_profiles.score) for run in runs]
    counts = ", ".join(f"{len(run.rollouts):,}" for run in runs)
    return html.section(
        "Where does the teacher still teach?",
        html.panels(
            runs,
            panel(
                "Teacher margin M",
                "mean margin M, nats",
                "How far the teacher's best candidate is ahead of its second best, among the"
                " student's own. Where it falls, the teacher no longer tells them apart.",
                mean_margin,
            ),
            html.panel(
                "Segment score S",
                figures.position(
                    "Segment score S",
                    "mean S = log(1 + M / nat), log scale",
                    [{"recorded rollouts, 95% interval": score} for score in scores],
                ),
                "What the rule looks for a drop in; each token with its sentence's S. Of the recorded"
                f" rollouts alone ({counts}).",
                "No rollouts were recorded.",
            ),
            panel(
                "Advantage A, mean",
                "mean advantage A, nats",
                "Teacher's less student's log-probability of the sampled token. Below 0, the"
                " student is surer of its text than the teacher.",
                lambda s: s["advantage_sum"] / s["tokens"],
                floor=0.0,
            ),
            panel(
                "Advantage A, spread",
                "standard deviation of A, nats",
                "A wide spread with a small margin is variance without direction.",
                lambda s: np.sqrt(
                    np.maximum(
                        s["advantage_sq_sum"] / s["tokens"] - (s["advantage_sum"] / s["tokens"]) ** 2,
                        0.0,
                    )
                ),
            ),
            panel(
                "Supervised share",
                "supervised share of tokens",
                "The share of tokens at each position that enter the loss.",
                lambda s: s["kept_tokens"] / s["tokens"],
                floor=0.0,
            ),
        ),
    )


def mean_margin(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Profile of the teacher's margin M, nats, for `position_profile`."""
    return sums["contrast_sum"] / sums["tokens"]


def position_profile(run: Run, profile: Callable) -> dict[str, np.ndarray]:
    """A profile over the position, for the first and the last quarter of a run's steps."""
    lines = [line for line in run.train if line.get("position_tokens")]
    quarter = len(lines) // 4
    if quarter < 2:
        parts = {"all steps": lines}
    else:
        parts = {"first quarter of steps": lines[:quarter], "last quarter": lines[-quarter:]}
    result = {}
    for window, part in parts.items():
        sums = {name: binned(part, f"position_{name}") for name in BINS}
        sums["tokens"] = np.where(sums["tokens"] > 0, sums["tokens"], np.nan)
        if part:
            result[window] = profile(sums)
    return result


def binned(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The sum over steps of a metric that is a list of bins; values that are not finite count as 0."""
    rows = [np.array(line[key], float) for line in lines if line.get(key)]
    return np.nansum(rows, axis=0) if rows else np.zeros(1)


def _release(runs: Sequence[Run]) -> str:
    counts = [binned(run.train, "release_histogram") for run in runs]
    return html.section(
        "What is released?",
        html.words(runs, [_release_words(run, count) for run, count in zip(runs, counts, strict=True)]),
        html.panels(
            runs,
            html.panel(
                "Release positions",
                figures.release_histogram(counts),
                "Supervision ends at the cut; what follows it adds nothing to the loss.",
                "No rollout of any run had an accepted release.",
            ),
            html.panel(
                "Kept and accepted",
                html.curve(
                    runs,
                    "Shares over the steps",
                    "share of tokens (kept), of rollouts (accepted)",
                    "kept_share",
                    "accepted_share",
                    share=True,
                ),
                "Kept: share of response tokens that are supervised. Accepted: share of rollouts"
                " with a release.",
                "No shares were recorded.",
            ),
        ),
    )


def _release_words(run: Run, count: np.ndarray) -> str:
    total = count.sum()
    if not total:
        kept = column(run.train, "kept_share")[1]
        share = f"; {np.mean(kept):.0%} of the response tokens are supervised" if kept else ""
        return f"rule “{escape(run.rule)}”, no accepted releases{share}."
    # The median, interpolated linearly inside its bin.
    edges = np.linspace(0, 1, len(count) + 1)
    median = np.interp(0.5 * total, np.concatenate([[0], np.cumsum(count)]), edges)
    accepted = column(run.train, "accepted_share")[1]
    share = f" ({np.mean(accepted):.0%} of rollouts)" if accepted else ""
    # A step's gain is the mean over its accepted rollouts, so its weight is their number.
    weighed = [
        (line["gain"], sum(line["release_histogram"]))
        for line in run.train
        if line.get("gain") is not None and line.get("release_histogram")
    ]
    gains, releases = np.array(weighed, float).reshape(-1, 2).T
    mean_gain = f", mean BIC gain {gains @ releases / releases.sum():.1f}" if releases.sum() else ""
    return (
        f"rule “{escape(run.rule)}”, {total:,.0f} accepted releases{share}, median position"
        f" {median:.0%} of the response{mean_gain}."
    )


def _health(runs: Sequence[Run]) -> str:
    return html.section(
        "Is the training sound?",
        html.panels(
            runs,
            html.panel(
                "Gradient norm",
                html.curve(runs, "Gradient norm over the steps", GRADIENT, "grad_norm"),
                "Global norm before clipping.",
                "No gradient norm was recorded.",
            ),
            html.panel(
                "Response length",
                html.curve(
                    runs, "Response length over the steps", "mean response length, tokens", "response_length"
                ),
                "Mean length of a rollout.",
                "No response length was recorded.",
            ),
            html.panel(
                "Does the student stop?",
                html.curve(
                    runs, "Finished share over the steps", "share of rollouts", "finished_share", share=True
                ),
                "Share of rollouts that ended by themselves. One that falls to 0 has all responses run"
                " into the limit; the next plot tells whether the teacher wants that.",
                "No finished share was recorded.",
            ),
            html.panel(
                "Would the teacher stop?",
                html.curve(
                    runs,
                    "Probability of an end token over the steps",
                    "probability of an end token at a position",
                    "stop_probability",
                    "teacher_stop_probability",
                ),
                "Mean probability of an end token on the student's responses: the student's (solid) and"
                " the teacher's (dashed). The student is trained towards the dashed line.",
                "No stop probability was recorded.",
            ),
            html.panel(
                "Does the student loop?",
                html.curve(
                    runs,
                    "Repeated share over the steps",
                    "share of rollouts that end in a loop",
                    "repeated_share",
                    share=True,
                ),
                "Share of rollouts whose last tokens repeat with a short period: what a loop writes teaches"
                " little and costs as much as any text.",
                "No repeated share was recorded.",
            ),
            html.panel(
                "Spread of the advantage",
                html.curve(
                    runs,
                    "Advantage spread over the steps",
                    "standard deviation of A, nats",
                    "advantage_std",
                ),
                "Standard deviation of A over the response tokens of a step.",
                "No spread was recorded.",
            ),
        ),
    )


def _time(runs: Sequence[Run]) -> str:
    svg = figures.phase_bars([run.title for run in runs], [phase_seconds(run) for run in runs])
    panel = html.panel(
        "Time of a step",
        svg,
        "“Other” is what the phases do not cover: waiting, logging, evaluation, checkpoints.",
        "No times were recorded.",
    )
    return html.section("Where does the time go?", html.panels(runs, panel))


def _rollouts(runs: Sequence[Run]) -> str:
    legend = (
        '<p class="key"><span><span class="kept">supervised sentence</span></span>'
        '<span><span class="partly">partly supervised</span></span>'
        '<span><span class="released">released sentence</span></span>'
        "<span><sub>1.23</sub> its mean margin M, nats</span></p>"
        "<p>Bars above a text: a sentence each, as wide as its tokens and as high as its M.</p>"
    )
    # Many runs make a long page, so each is folded until the reader opens it.
    state = " open" if len(runs) <= 2 else ""
    body = []
    for i, run in enumerate(runs):
        shown = report_rollouts.articles(run.rollouts) or '<p class="empty">No rollouts were recorded.</p>'
        colour = f"--kept: var(--run-{i % canvas.RUN_COLOURS})"
        body.append(
            f'<details{state} style="{colour}"><summary>{html.swatch(i)}{escape(run.title)}</summary>'
            f"{shown}</details>"
        )
    return html.section("Rollouts, sentence by sentence", legend, *body)


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    if not answers:
        return ""
    articles = [
        f'<article><p class="prompt">{escape(item["prompt"])}</p><div class="answers">'
        + "".join(
            f'<div><h4>{escape(label)}</h4><p class="response">{escape(text)}</p></div>'
            for label, text in item["answers"].items()
        )
        + "</div></article>"
        for item in answers
    ]
    return html.section("Answers to the same prompts", *articles)


def _provenance(runs: Sequence[Run]) -> str:
    """Versions and the whole config of each run, folded."""
    blocks = []
    for i, run in enumerate(runs):
        versions = ", ".join(f"{key} {value}" for key, value in run.versions.items())
        blocks.append(
            f"<details><summary>{html.swatch(i)}{escape(run.title)}: versions and config</summary>"
            f"<p>{escape(versions) or 'No versions.json.'}</p>"
            f"<pre>{escape(json.dumps(run.config, indent=2)) if run.config else 'No config.json.'}"
            "</pre></details>"
        )
    return html.section("Provenance", *blocks)
