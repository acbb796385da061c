"""The plots of a report, as SVG text whose colours follow the page's light or dark scheme (`canvas.py`).

A function returns None if the runs have nothing to draw. Every axis has a label with its unit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from opd_jax.report import canvas

POSITION = "relative position in the response, share of its tokens"
SAMPLED = {"markerfacecolor": "none"}  # hollow marks; held-out points have filled ones


def curves(
    name: str,
    unit: str,
    kinds: Sequence[tuple[str, str, Sequence[canvas.Series]]],
    share: bool = False,
) -> str | None:
    """Curves over the steps.

    Args:
      kinds: (label, line style, a series for each run); several kinds get a legend.
      share: the values are shares, so the axis goes from 0 to 1.
    """
    kinds = [kind for kind in kinds if any(steps for steps, _ in kind[2])]
    if not kinds:
        return None

    def draw(axes: Axes) -> None:
        for _, style, runs in kinds:
            for run, series in enumerate(runs):
                if series[0]:
                    canvas.line(axes, series, run, linestyle=style)
        if share:
            axes.set_ylim(-0.03, 1.03)
        if len(kinds) > 1:
            canvas.line_legend(axes, [(label, {"linestyle": style}) for label, style, _ in kinds])
        canvas.label(axes, canvas.STEP, unit)

    return canvas.svg(name, draw)


def kl(sampled: Sequence[canvas.Series], evals: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """KL over the steps: sampled in training as lines, held out as points with intervals."""
    measured = [[line for line in lines if line.get("kl") is not None] for lines in evals]
    if not any(steps for steps, _ in sampled) and not any(measured):
        return None

    def draw(axes: Axes) -> None:
        for run, (series, lines) in enumerate(zip(sampled, measured, strict=True)):
            if series[0]:
                canvas.line(axes, series, run, **SAMPLED)
            if lines:
                value = np.array([line["kl"] for line in lines])
                low, high = (
                    np.array([line["kl"] if line.get(key) is None else line[key] for line in lines])
                    for key in ("kl_low", "kl_high")
                )
                axes.errorbar(
                    [line["step"] for line in lines],
                    value,
                    yerr=np.maximum([value - low, high - value], 0.0),
                    markersize=5.5,
                    capsize=3,
                    elinewidth=1.2,
                    zorder=3,
                    **canvas.mark(run),
                )
        if axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
        kinds = []
        if any(steps for steps, _ in sampled):
            kinds.append(("sampled in training", SAMPLED | {"marker": "o"}))
        if any(measured):
            kinds.append(("held out, 95% interval", {"linestyle": "", "marker": "o"}))
        canvas.line_legend(axes, kinds)
        canvas.label(axes, canvas.STEP, "KL(student ‖ teacher), nats/token")

    return canvas.svg("KL over the steps", draw, height=3.4)


def position(
    name: str,
    unit: str,
    profiles: Sequence[Mapping[str, np.ndarray | None]],
    floor: float | None = None,
    styles: Mapping[str, str] | None = None,
) -> str | None:
    """Profiles over the relative position in the response.

    Args:
      profiles: for each run {window or group: values}. Values are one number for each bin, NaN if it is
        empty; or [3, bins], the values and the ends of their intervals, which are drawn as a band.
      floor: a value that the axis must include, drawn as a line.
      styles: the line style of each group; by default the first of two windows is dotted.
    """
    profiles = [{key: x for key, x in profile.items() if x is not None} for profile in profiles]
    if not any(profiles):
        return None
    if styles is None:
        styles = {}
        for profile in profiles:
            for number, window in enumerate(profile):
                styles[window] = ":" if number == 0 and len(profile) > 1 else "-"

    def draw(axes: Axes) -> None:
        for run, profile in enumerate(profiles):
            for window, value in profile.items():
                value_N, *interval = np.atleast_2d(value)
                centre = (np.arange(len(value_N)) + 0.5) / len(value_N)
                style = styles[window]
                axes.plot(
                    centre,
                    value_N,
                    linestyle=style,
                    color=canvas.colour(run),
                    **canvas.marks(run, len(value_N)),
                )
                if interval:
                    axes.fill_between(centre, *interval, color=canvas.colour(run), alpha=0.15, linewidth=0)
        if floor is not None:
            axes.axhline(floor, color=canvas.MUTED, linewidth=0.8)
        axes.set_xlim(0, 1)
        shown = {window for profile in profiles for window in profile}
        canvas.line_legend(
            axes, [(window, {"linestyle": style}) for window, style in styles.items() if window in shown]
        )
        canvas.label(axes, POSITION, unit)

    return canvas.svg(name, draw)


def release_histogram(counts: Sequence[np.ndarray | None]) -> str | None:
    """Positions of accepted releases: the share of a run's accepted releases in each bin."""
    if not any(count is not None and count.sum() for count in counts):
        return None

    def draw(axes: Axes) -> None:
        for run, count in enumerate(counts):
            if count is not None and count.sum():
                edges = np.linspace(0, 1, len(count) + 1)
                share = count / count.sum()
                axes.stairs(share, edges, color=canvas.colour(run), fill=True, alpha=0.2)
                axes.stairs(share, edges, color=canvas.colour(run), linewidth=1.4)
                centre = (edges[:-1] + edges[1:]) / 2
                axes.plot(
                    centre, share, linestyle="", color=canvas.colour(run), **canvas.marks(run, len(share))
                )
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        canvas.label(axes, POSITION, "share of accepted releases")

    return canvas.svg("Where supervision is released", draw)


def sentence_margins(sentences: Sequence[Mapping[str, Any]]) -> str:
    """One rollout: the mean margin of each sentence, the cut, and the means before and after it.

    Args:
      sentences: from a rollouts.jsonl record, in order; reads tokens, kept and contrast (nats).
    """
    tokens = np.array([sentence["tokens"] for sentence in sentences])
    contrast = np.array([sentence["contrast"] for sentence in sentences], float)
    kept = np.array([sentence["kept"] for sentence in sentences])
    edges = np.concatenate([[0], np.cumsum(tokens)])

    def draw(axes: Axes) -> None:
        looks: dict[bool, dict[str, Any]] = {
            True: {"facecolor": colors.to_rgba(canvas.colour(0), 0.3), "edgecolor": canvas.colour(0)},
            False: {"facecolor": "none", "edgecolor": canvas.MUTED, "linestyle": "--"},
        }
        for left, height, width, on in zip(edges, contrast, tokens, kept, strict=False):
            axes.bar(left, height, width, align="edge", linewidth=1.2, **looks[bool(on)])
        cut = int(kept.argmin())  # 0 where all are kept
        for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
            level = np.expm1(np.log1p(contrast[part]).mean())  # the mean of the rule's scores, as a margin
            axes.hlines(level, edges[:-1][part][0], edges[1:][part][-1], color=canvas.INK, linewidth=1.6)
        if cut:
            axes.axvline(edges[cut], color=canvas.INK, linestyle=":", linewidth=2)
        entries = [
            *(Patch(**looks[on], label="supervised" if on else "released") for on in (True, False)),
            Line2D([], [], color=canvas.INK, label="mean"),
            Line2D([], [], color=canvas.INK, linestyle=":", label="cut"),
        ]
        axes.set_xlim(0, edges[-1])
        canvas.legend(axes, entries)
        canvas.label(axes, "position in the response, tokens", "teacher margin M, nats")

    return canvas.svg("Teacher margin, sentence by sentence", draw)


def answers(records: Sequence[Mapping[str, Any]]) -> str:
    """Answers as bars of kept and released tokens, one below the other, the shortest kept part first.

    Args:
      records: from rollouts.jsonl; reads tokens and kept_tokens.
    """
    return canvas.svg("Kept and released tokens of long answers", lambda axes: _answers(axes, records))


def stops(records: Sequence[Mapping[str, Any]], whole: float) -> str:
    """`answers` of rollouts that may have stopped, with what those did not write.

    Args:
      records: from rollouts.jsonl; reads tokens, kept_tokens and stopped.
      whole: tokens up to which what was not written is drawn; NaN for none.
    """

    def draw(axes: Axes) -> None:
        rows = _answers(axes, records)
        written = np.array([record["tokens"] for record in rows], float)
        rest = np.array([max(whole - record["tokens"], 0) if record["stopped"] else 0 for record in rows])
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": canvas.MUTED, "linewidth": 0.6}
        place = np.flatnonzero(rest > 0)
        axes.barh(place, rest[place], 0.7, written[place], linestyle=":", **look)
        axes.set_ylabel(f"{len(rows)} rollouts of the step")

    return canvas.svg("Kept, released and unwritten tokens of rollouts", draw)


def margin_and_answers(records: Sequence[Mapping[str, Any]], margin_3N: np.ndarray) -> str:
    """The teacher's margin along long answers, next to the parts that are kept and released.

    Args:
      records: as in `answers`.
      margin_3N: mean margin in equal parts of the answers, and the ends of its interval, nats.
    """

    def draw(left: Axes, right: Axes) -> None:
        mean_N, low_N, high_N = margin_3N
        centre = (np.arange(len(mean_N)) + 0.5) / len(mean_N)
        left.plot(centre, mean_N, color=canvas.colour(0), marker="o", markersize=4.5)
        left.fill_between(centre, low_N, high_N, color=canvas.colour(0), alpha=0.15, linewidth=0)
        left.set_xlim(0, 1)
        left.set_title("The teacher's preference fades ...", loc="left", fontsize=10, pad=20)
        canvas.label(
            left, "position in the answer, share of its tokens", "teacher margin, nats (95% interval)"
        )
        _answers(right, records)
        right.set_title("... and supervision stops there, answer by answer", loc="left", fontsize=10, pad=20)

    return canvas.svg("Teacher margin along long answers, and what is kept of them", draw, columns=2)


def _answers(axes: Axes, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Draws the bars; returns the records from top to bottom."""
    rows = sorted(records, key=lambda record: (record["kept_tokens"], record["tokens"]))
    kept = np.array([record["kept_tokens"] for record in rows])
    rest = np.array([record["tokens"] for record in rows]) - kept
    place = np.arange(len(rows))
    looks: dict[str, dict[str, Any]] = {
        "supervised": {"color": colors.to_rgba(canvas.colour(0), 0.75)},
        "released": {"facecolor": "none", "edgecolor": canvas.MUTED, "linewidth": 0.8},
    }
    axes.barh(place, kept, 0.7, **looks["supervised"])
    axes.barh(place[rest > 0], rest[rest > 0], 0.7, kept[rest > 0], **looks["released"])
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    canvas.legend(axes, [Patch(label=label, **look) for label, look in looks.items()])
    canvas.label(axes, "tokens", f"{len(rows)} answers")
    return rows


def phase_bars(titles: Sequence[str], seconds: Sequence[Mapping[str, float]]) -> str | None:
    """Stacked bars of the seconds of each phase of a step, one bar per run."""
    if not any(seconds):
        return None
    names = list(dict.fromkeys(name for phases in seconds for name in phases))
    alphas = dict(zip(names, (1.0, 0.6, 0.35, 0.15), strict=False))

    def draw(axes: Axes) -> None:
        for run, phases in enumerate(seconds):
            left = 0.0
            for name, value in phases.items():
                axes.barh(run, value, 0.6, left, color=canvas.colour(run), alpha=alphas[name])
                left += value
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{left:.3g} s", (left, run), **place)
        # A title is the user's text: a dollar sign in it does not start a formula.
        axes.set_yticks(range(len(titles)), titles, parse_math=False)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        canvas.legend(axes, [Patch(color=canvas.INK, alpha=alphas[name], label=name) for name in names])
        canvas.label(axes, "seconds a step (median)", "run")

    return canvas.svg("Time of a step by phase", draw, height=1.3 + 0.4 * len(titles))


def intervals(
    unit: str,
    labels: Sequence[str],
    estimates: Sequence[tuple[float, float, float]],
    runs: Sequence[int | None],
) -> str:
    """Estimates (value, low, high) one below the other, in the colours of `runs`; None is drawn in ink."""

    def draw(axes: Axes) -> None:
        for row, (run, (value, low, high)) in enumerate(zip(runs, estimates, strict=True)):
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            style: dict[str, Any] = {"fmt": "d", "color": canvas.INK} if run is None else canvas.mark(run)
            axes.errorbar([value], [row], xerr=error, markersize=5.5, elinewidth=1.2, capsize=3, **style)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        canvas.label(axes, f"{unit}, 95% interval", "arm")

    return canvas.svg(unit, draw, height=1.0 + 0.3 * len(labels))


def groups(
    name: str, unit: str, titles: Sequence[str], estimates: Sequence[Mapping[str, tuple | None]]
) -> str | None:
    """Estimates (value, low, high) for right (filled) and wrong (hollow) answers, run by run."""
    if not any(value is not None for found in estimates for value in found.values()):
        return None

    def draw(axes: Axes) -> None:
        for run, found in enumerate(estimates):
            for group, estimate in found.items():
                if estimate is None:
                    continue
                value, low, high = estimate
                right = group == "right"
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                row = run + (-0.15 if right else 0.15)
                style = canvas.mark(run, hollow=not right)
                axes.errorbar([value], [row], xerr=error, markersize=5.5, elinewidth=1.2, capsize=3, **style)
        axes.set_yticks(range(len(titles)), titles, parse_math=False)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        looks = {"right": {}, "wrong": {"markerfacecolor": "none"}}
        canvas.line_legend(
            axes, [(group, {"linestyle": "", "marker": "o"} | look) for group, look in looks.items()]
        )
        canvas.label(axes, unit, "run")

    return canvas.svg(name, draw, height=1.3 + 0.4 * len(titles))
