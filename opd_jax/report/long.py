"""The section of a report on long answers: how the teacher's margin falls, and how much follows the cuts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.report import figures, html, rollout_profiles
from opd_jax.report import rollouts as report_rollouts

SHOWN = 3  # answers whose text is shown, the clearest releases first

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Long answers in numbers.

    Attributes:
      answers: number of answers.
      tokens, sentences: means per answer.
      margin: the teacher's mean margin M in each fifth of the answers, nats.
      advantage: the mean advantage A in each fifth, nats.
      accepted: share of answers with an accepted release.
      kept: mean share of those answers that stays supervised; NaN if there are none.
      released: share of all tokens that follow a cut.
    """

    answers: int
    tokens: float
    sentences: float
    margin: tuple[float, ...]
    advantage: tuple[float, ...]
    accepted: float
    kept: float
    released: float

    def __str__(self) -> str:
        margins, advantages = (
            " ".join(f"{value:.2f}" for value in values) for values in (self.margin, self.advantage)
        )
        text = (
            f"{self.answers} answers, on average {self.tokens:.0f} tokens in {self.sentences:.0f} sentences."
            f" Over the fifths of an answer, the teacher's margin is {margins} nats and the advantage"
            f" {advantages} nats. "
        )
        if not self.accepted:
            return text + "No answer has an accepted release."
        return text + (
            f"The rule releases {self.accepted:.0%} of the answers and keeps {self.kept:.0%} of those; "
            f"{self.released:.0%} of all tokens lie after a cut: written and scored, and not learnt from."
        )


def summarise(records: Sequence[Record]) -> Summary:
    """Summarises records of `run.preview`; needs at least one."""
    accepted = [record for record in records if record["accepted"]]
    tokens = sum(record["tokens"] for record in records)
    kept = [record["kept_tokens"] / record["tokens"] for record in accepted]
    return Summary(
        answers=len(records),
        tokens=tokens / len(records),
        sentences=float(np.mean([len(record["sentences"]) for record in records])),
        margin=_fifths(records, rollout_profiles.margin),
        advantage=_fifths(records, rollout_profiles.advantage),
        accepted=len(accepted) / len(records),
        kept=float(np.mean(kept)) if kept else float("nan"),
        released=sum(record["tokens"] - record["kept_tokens"] for record in accepted) / tokens,
    )


def section(records: Sequence[Record]) -> str:
    """The section as HTML; "" without records."""
    if not records:
        return ""
    margin = rollout_profiles.profile(records, rollout_profiles.margin)
    panels = (
        html.panel(
            "Teacher margin M",
            figures.position("Margin in long answers", "mean margin M, nats", [{"95% interval": margin}]),
            "How far the teacher's best candidate is ahead of its second best, among the student's own. Each"
            " token with its sentence's mean.",
            "No margin was recorded.",
        ),
        html.panel(
            "Kept and released",
            figures.answers(records),
            "One bar an answer, the shortest prefix first. Supervision ends at the cut.",
            "No answer was recorded.",
        ),
    )
    clearest = sorted(records, key=lambda record: (not record["accepted"], -(record["gain"] or 0)))[:SHOWN]
    return html.section(
        "Long answers",
        f"<p>{summarise(records)}</p>",
        f'<div class="panels">{"".join(panels)}</div>',
        f"<details><summary>{len(clearest)} of them</summary>{report_rollouts.articles(clearest)}</details>",
    )


def _fifths(records: Sequence[Record], quantity) -> tuple[float, ...]:
    """A quantity's mean over the fifths of the answers, each token with its sentence's value."""
    sums_3N = np.sum(
        [rollout_profiles.sums(record, quantity) for record in records if record["tokens"]], axis=0
    )
    tokens_5, total_5 = sums_3N[:2].reshape(2, 5, -1).sum(axis=2)
    return tuple((total_5 / np.maximum(tokens_5, 1)).tolist())
