"""The section of a report that compares right and wrong answers, from a run's recorded rollouts."""

from collections.abc import Sequence

from opd_jax.report import figures, html
from opd_jax.report import rollout_profiles as profiles
from opd_jax.run import Run

TITLE = "Right and wrong answers"
LINES = {"right": "-", "wrong": "--"}
PROFILES = (
    ("Teacher margin M", "mean margin M, nats", profiles.margin, profiles.mean),
    ("Segment score S", "mean S = log(1 + M / nat), log scale", profiles.score, profiles.mean),
    ("Advantage A, mean", "mean advantage A, nats", profiles.advantage, profiles.mean),
    ("Advantage A, spread", "standard deviation of A, nats", profiles.advantage, profiles.spread),
)
SHARES = (
    ("Releases accepted", "share of rollouts with an accepted release", profiles.accepted_share),
    ("BIC gain", "mean BIC gain of accepted releases, BIC units", profiles.gain),
    ("Release position", "mean share of the response kept, accepted releases", profiles.release_position),
)


def section(runs: Sequence[Run]) -> str:
    """The section; if no rollout of any run is graded, one line that says why."""
    groups = [profiles.by_answer(run.rollouts) for run in runs]
    if not any(groups):
        return html.section(TITLE, f'<p class="empty">{_why_not(runs)}</p>')
    lines = []
    for run, found in zip(runs, groups, strict=True):
        counts = ", ".join(f"{len(group):,} {name}" for name, group in found.items()) or "none graded"
        lines.append(f"{len(run.rollouts):,} recorded rollouts, {counts}.")
    drawn = []
    for name, unit, quantity, statistic in PROFILES:
        curves = [
            {key: profiles.profile(group, quantity, statistic) for key, group in found.items()}
            for found in groups
        ]
        svg = figures.position(f"{name}: right, wrong", unit, curves, styles=LINES)
        note = "Each token with its sentence's value; band: 95% interval over rollouts."
        drawn.append(html.panel(name, svg, note, "The runs did not record this of their rollouts."))
    titles = [run.title for run in runs]
    for name, unit, estimate in SHARES:
        found = [{key: estimate(group) for key, group in run.items()} for run in groups]
        svg = figures.groups(f"{name}: right, wrong", unit, titles, found)
        note = "Filled: right answers. Hollow: wrong ones. Bars: 95% interval over rollouts."
        drawn.append(html.panel(name, svg, note, "No graded rollout had an accepted release."))
    about = (
        "<p>Of the recorded rollouts of all steps together, graded by their final answers. A difference is no"
        " cause: right answers are also those of easier prompts.</p>"
    )
    return html.section(TITLE, html.words(runs, lines), about, html.panels(runs, *drawn))


def _why_not(runs: Sequence[Run]) -> str:
    if not any(run.rollouts for run in runs):
        return (
            "No rollout was recorded, so none is graded; train with metrics.rollouts and"
            " metrics.rollouts_every above 0."
        )
    return "No recorded rollout is graded: its prompts carry no answer, or an earlier version recorded it."
