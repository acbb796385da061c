"""Tables of the study: arms beside full supervision, and cuts with and without the rescale, over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.errors import UserError
from opd_jax.evaluation import seed_interval


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
        f"| arm | {name} | minus full, equal steps | minus full, equal supervised tokens | supervised |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["arm"], f"{row['value']:.3f} {_span(row['interval'])}"]
        for kind in ("steps", "tokens"):
            known = kind in row
            cells.append(f"{row[kind]:+.3f} {_span(row[kind + '_interval'], '+')}" if known else "–")
        lines.append(f"| {' | '.join(cells)} | {row['supervised_share']:.0%} |")
    return "\n".join(lines)


def rescaled(
    rows: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]], quantity: str
) -> list[dict[str, Any]]:
    """One row a rule: the quantity after the last step with the rescale and without it, over seeds.

    Args:
      rows: evaluations of arms, full first.
      without: those of the same arms with release.rescale=none, named ARM+rescale=none.

    Returns:
      with, without: means. less: the value without the rescale minus the value with it, seed by seed.
      less_full: the value without it minus full supervision's. Each has a 95% Student's t interval over
      seeds as NAME_interval.

    Raises:
      UserError: a run has no counterpart of its seed.
    """
    ends = {(row["arm"], row["seed"]): row[quantity] for row in sorted(rows, key=lambda row: row["step"])}
    ends_without = {(r["arm"], r["seed"]): r[quantity] for r in sorted(without, key=lambda r: r["step"])}
    full = rows[0]["arm"]
    found = []
    for arm in dict.fromkeys(row["arm"] for row in without):
        name = arm.partition("+")[0]
        seeds = [seed for other, seed in ends_without if other == arm]
        lacking = [f"{other}/seed-{s}" for other in (name, full) for s in seeds if (other, s) not in ends]
        if lacking:
            raise UserError(
                f"--sorting lacks {lacking[0]}, which {arm} of --sorting_rescale is compared with; run it too"
            )
        values = {
            "with": [ends[name, seed] for seed in seeds],
            "without": [ends_without[arm, seed] for seed in seeds],
            "less": [ends_without[arm, seed] - ends[name, seed] for seed in seeds],
            "less_full": [ends_without[arm, seed] - ends[full, seed] for seed in seeds],
        }
        row = {"arm": name, "seeds": len(seeds)} | {key: np.mean(part) for key, part in values.items()}
        found.append(row | {f"{key}_interval": _interval(part) for key, part in values.items()})
    return found


def rescaled_markdown(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """`rescaled` as Markdown."""
    lines = [
        f"| rule | {name}, with the rescale | without | without minus with | without minus full |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[key]:.3f} {_span(row[f'{key}_interval'])}" for key in ("with", "without")]
        cells += [f"{row[key]:+.3f} {_span(row[f'{key}_interval'], '+')}" for key in ("less", "less_full")]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(values) -> tuple[float, float]:
    return seed_interval(values) if len(values) > 1 else (float("nan"), float("nan"))


def _span(interval, sign: str = "") -> str:
    return "" if np.isnan(interval[0]) else f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
