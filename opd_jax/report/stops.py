"""The section of a report on rollouts that stop early (release.stop)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.report import figures, html
from opd_jax.run import Run, column, phase_seconds

TITLE = "Which rollouts stop?"
BARS = 32  # rollouts of the latest recorded step


def section(runs: Sequence[Run]) -> str:
    """The section; if no run stops any, one line that says how."""
    if not any(_steps(run) for run in runs):
        why = "None: release.stop=never. The teacher can read along and stop rollouts; see docs/stopping.md."
        return html.section(TITLE, f'<p class="empty">{why}</p>')
    return html.section(
        TITLE,
        html.words(runs, [_words(run) for run in runs]),
        html.panels(
            runs,
            html.panel(
                "How rollouts end",
                html.curve(
                    runs,
                    "Endings over the steps",
                    "share of rollouts",
                    "stopped_share",
                    "finished_share",
                    share=True,
                ),
                "Stopped: by release.stop. Finished: by an end token. All others reach the length limit.",
                "No shares were recorded.",
            ),
            *(_bars(run) for run in runs if _steps(run)),
        ),
    )


def _steps(run: Run) -> list[Mapping[str, Any]]:
    return [line for line in run.train if line.get("stopped_share") is not None]


def audited(run: Run, name: str) -> tuple[float, float]:
    """(the mean of a metric over all audited rollouts of a run, NaN without any; their number)."""
    found = [(line[name], line["audit_rows"]) for line in _steps(run) if line.get(name) is not None]
    values, counts = np.array(found, float).reshape(-1, 2).T
    return (float(values @ counts / counts.sum()), counts.sum()) if counts.sum() else (np.nan, 0.0)


def _words(run: Run) -> str:
    steps = _steps(run)
    if not steps:
        return "every rollout is written to its end."
    shares = {name: np.mean(column(steps, f"{name}_share")[1]) for name in ("stopped", "finished", "limit")}
    written = sum(line["response_tokens"] for line in steps)
    words = (
        f"{shares['stopped']:.0%} of the rollouts stopped, {shares['finished']:.0%} finished,"
        f" {shares['limit']:.0%} reached the length limit; {written:,.0f} tokens written"
    )
    length, count = audited(run, "audit_length")
    if not count:
        return words + ". No rollout was audited, so what was saved is not known."
    rows = sum(line["response_tokens"] / line["response_length"] for line in steps if line["response_length"])
    whole = max(length * rows, written)
    words += (
        f" of about {whole:,.0f} ({written / whole:.0%}), since the {count:.0f} audited ones, which are"
        f" written to their ends, have {length:.0f} tokens on average"
    )
    sampling = phase_seconds(run).get("sample")
    if sampling:
        words += (
            f". At the same speed, the rest would take {sampling * (whole / written - 1):.3g} s more a step"
        )
    agreement, judged = audited(run, "audit_agreement")
    if judged:
        words += (
            f". The rule decided and cut as on the whole response in {agreement:.0%} of the audited rollouts"
        )
    return words + "."


def _bars(run: Run) -> str:
    last = max((rollout["step"] for rollout in run.rollouts), default=0)
    records = [r for r in run.rollouts if r["step"] == last and "stopped" in r][:BARS]
    length, _ = audited(run, "audit_length")
    return html.panel(
        f"Rollouts of step {last}",
        figures.stops(records, length) if records else None,
        "A rollout a bar, the shortest kept part first. A dotted end stands for what a stopped one did not"
        " write, up to the mean length of the audited ones.",
        "No rollouts were recorded.",
    )
