"""The plots of a report, as SVG text whose colours follow the page's light or dark scheme.

Colours are drawn as placeholders, which CSS variables then replace: `--run-0`, `--run-1`, ... (one per run,
the same in every plot), `--ink`, `--muted` and `--grid`. A function returns None if the runs have nothing to
draw. Each run has a colour and a mark: colours repeat after 8 runs, marks after 7. Every axis has a label
with its unit.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colors, ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

Series = tuple[Sequence[int], Sequence[float]]  # steps, values

RUN_COLOURS = 8
INK, MUTED, GRID = "#111101", "#111102", "#111103"
MARKERS = "osD^vPX"  # 7, so that colour and mark together repeat after 56 runs
STEP = "training step"
POSITION = "relative position in the response, share of its tokens"
SAMPLED = {"markerfacecolor": "none"}  # hollow marks; held-out points have filled ones
MOST_POINTS = 400  # of a line, so that a long run does not make a large page
STYLE: dict[Any, Any] = {  # matplotlib's settings
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def colour(number: int) -> str:
    """The placeholder of a run's colour."""
    return f"#1112{number % RUN_COLOURS:02x}"


def _svg(name: str, draw: Callable[..., Any], height: float = 3.1, columns: int = 1) -> str:
    """Draws `columns` axes side by side, each 5.2 by `height` inches, and returns the <svg> element.

    Args:
      draw: called with all axes.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # ids differ between the plots of a page
        figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        svg = svg.replace(placeholder, f"var(--{variable})")
    svg = re.sub(r"#1112(\d\d)", lambda match: f"var(--run-{int(match[1])})", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """A legend above the axes, where no curve can cross it."""
    axes.legend(
        handles=handles,
        fontsize=8,
        handlelength=2.6,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )


def _kinds(axes: Axes, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """A legend of line kinds, in ink; the page explains the runs' colours."""
    _legend(axes, [Line2D([], [], color=INK, label=label, **style) for label, style in entries])


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points, so that at most MOST_POINTS remain."""
    parts = min(len(x), MOST_POINTS)
    split_x, split_y = (np.array_split(np.asarray(v, float), parts) for v in (x, y))
    return np.array([part.mean() for part in split_x]), np.array([part.mean() for part in split_y])


def _smooth(y: np.ndarray) -> np.ndarray:
    """A centred running mean over a fifteenth of the points, narrower at both ends."""
    half = len(y) // 30
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _line(axes: Axes, series: Series, run: int, **style: Any) -> None:
    """One run's curve. If it has many points, its running mean, with the points drawn faintly."""
    steps, values = _thin(*series)
    if len(values) >= 40:
        axes.plot(steps, values, color=colour(run), linewidth=0.7, alpha=0.35)
        values = _smooth(values)
    axes.plot(steps, values, color=colour(run), **_marks(run, len(values)) | style)


def _marks(run: int, points: int) -> dict[str, Any]:
    """A few of the run's marks on a curve, at other places than the next run's."""
    every = max(1, points // 5)
    start = int(every * (0.618 * run % 1))
    return {"marker": MARKERS[run % len(MARKERS)], "markersize": 4.5, "markevery": (start, every)}


def _mark(run: int, hollow: bool = False) -> dict[str, Any]:
    """The run's mark and colour, for a single value."""
    mark = {"fmt": MARKERS[run % len(MARKERS)], "color": colour(run)}
    return mark | {"markerfacecolor": "none"} if hollow else mark


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == STEP:
        locator = axes.xaxis.get_major_locator()
        if isinstance(locator, ticker.MaxNLocator):
            locator.set_params(integer=True)


def curves(
    name: str,
    unit: str,
    kinds: Sequence[tuple[str, str, Sequence[Series]]],
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
                    _line(axes, series, run, linestyle=style)
        if share:
            axes.set_ylim(-0.03, 1.03)
        if len(kinds) > 1:
            _kinds(axes, [(label, {"linestyle": style}) for label, style, _ in kinds])
        _label(axes, STEP, unit)

    return _svg(name, draw)


def kl(sampled: Sequence[Series], evals: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """KL over the steps: sampled in training as lines, held out as points with intervals."""
    measured = [[line for line in lines if line.get("kl") is not None] for lines in evals]
    if not any(steps for steps, _ in sampled) and not any(measured):
        return None

    def draw(axes: Axes) -> None:
        for run, (series, lines) in enumerate(zip(sampled, measured, strict=True)):
            if series[0]:
                _line(axes, series, run, **SAMPLED)
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
                    **_mark(run),
                )
        if axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
        kinds = []
        if any(steps for steps, _ in sampled):
            kinds.append(("sampled in training", SAMPLED | {"marker": "o"}))
        if any(measured):
            kinds.append(("held out, 95% interval", {"linestyle": "", "marker": "o"}))
        _kinds(axes, kinds)
        _label(axes, STEP, "KL(student ‖ teacher), nats/token")

    return _svg("KL over the steps", draw, height=3.4)


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
                axes.plot(centre, value_N, linestyle=style, color=colour(run), **_marks(run, len(value_N)))
                if interval:
                    axes.fill_between(centre, *interval, color=colour(run), alpha=0.15, linewidth=0)
        if floor is not None:
            axes.axhline(floor, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1)
        shown = {window for profile in profiles for window in profile}
        _kinds(axes, [(window, {"linestyle": style}) for window, style in styles.items() if window in shown])
        _label(axes, POSITION, unit)

    return _svg(name, draw)


def release_histogram(counts: Sequence[np.ndarray | None]) -> str | None:
    """Positions of accepted releases: the share of a run's accepted releases in each bin."""
    if not any(count is not None and count.sum() for count in counts):
        return None

    def draw(axes: Axes) -> None:
        for run, count in enumerate(counts):
            if count is not None and count.sum():
                edges = np.linspace(0, 1, len(count) + 1)
                share = count / count.sum()
                axes.stairs(share, edges, color=colour(run), fill=True, alpha=0.2)
                axes.stairs(share, edges, color=colour(run), linewidth=1.4)
                centre = (edges[:-1] + edges[1:]) / 2
                axes.plot(centre, share, linestyle="", color=colour(run), **_marks(run, len(share)))
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        _label(axes, POSITION, "share of accepted releases")

    return _svg("Where supervision is released", draw)


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
            True: {"facecolor": colors.to_rgba(colour(0), 0.3), "edgecolor": colour(0)},
            False: {"facecolor": "none", "edgecolor": MUTED, "linestyle": "--"},
        }
        for left, height, width, on in zip(edges, contrast, tokens, kept, strict=False):
            axes.bar(left, height, width, align="edge", linewidth=1.2, **looks[bool(on)])
        cut = int(kept.argmin())  # 0 where all are kept
        for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
            level = np.expm1(np.log1p(contrast[part]).mean())  # the mean of the rule's scores, as a margin
            axes.hlines(level, edges[:-1][part][0], edges[1:][part][-1], color=INK, linewidth=1.6)
        if cut:
            axes.axvline(edges[cut], color=INK, linestyle=":", linewidth=2)
        entries = [
            *(Patch(**looks[on], label="supervised" if on else "released") for on in (True, False)),
            Line2D([], [], color=INK, label="mean"),
            Line2D([], [], color=INK, linestyle=":", label="cut"),
        ]
        axes.set_xlim(0, edges[-1])
        _legend(axes, entries)
        _label(axes, "position in the response, tokens", "teacher margin M, nats")

    return _svg("Teacher margin, sentence by sentence", draw)


def answers(records: Sequence[Mapping[str, Any]]) -> str:
    """Answers as bars of kept and released tokens, one below the other, the shortest kept part first.

    Args:
      records: from rollouts.jsonl; reads tokens and kept_tokens.
    """
    return _svg("Kept and released tokens of long answers", lambda axes: _answers(axes, records))


def margin_and_answers(records: Sequence[Mapping[str, Any]], margin_3N: np.ndarray) -> str:
    """The teacher's margin along long answers, next to the parts that are kept and released.

    Args:
      records: as in `answers`.
      margin_3N: mean margin in equal parts of the answers, and the ends of its interval, nats.
    """

    def draw(left: Axes, right: Axes) -> None:
        mean_N, low_N, high_N = margin_3N
        centre = (np.arange(len(mean_N)) + 0.5) / len(mean_N)
        left.plot(centre, mean_N, color=colour(0), marker="o", markersize=4.5)
        left.fill_between(centre, low_N, high_N, color=colour(0), alpha=0.15, linewidth=0)
        left.set_xlim(0, 1)
        left.set_title("The teacher's preference fades ...", loc="left", fontsize=10, pad=20)
        _label(left, "position in the answer, share of its tokens", "teacher margin, nats (95% interval)")
        _answers(right, records)
        right.set_title("... and supervision stops there, answer by answer", loc="left", fontsize=10, pad=20)

    return _svg("Teacher margin along long answers, and what is kept of them", draw, columns=2)


def _answers(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    rows = sorted(records, key=lambda record: (record["kept_tokens"], record["tokens"]))
    kept = np.array([record["kept_tokens"] for record in rows])
    rest = np.array([record["tokens"] for record in rows]) - kept
    place = np.arange(len(rows))
    looks: dict[str, dict[str, Any]] = {
        "supervised": {"color": colors.to_rgba(colour(0), 0.75)},
        "released": {"facecolor": "none", "edgecolor": MUTED, "linewidth": 0.8},
    }
    axes.barh(place, kept, 0.7, **looks["supervised"])
    axes.barh(place[rest > 0], rest[rest > 0], 0.7, kept[rest > 0], **looks["released"])
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    _legend(axes, [Patch(label=label, **look) for label, look in looks.items()])
    _label(axes, "tokens", f"{len(rows)} answers")


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
                axes.barh(run, value, 0.6, left, color=colour(run), alpha=alphas[name])
                left += value
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{left:.3g} s", (left, run), **place)
        # A title is the user's text: a dollar sign in it does not start a formula.
        axes.set_yticks(range(len(titles)), titles, parse_math=False)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        _legend(axes, [Patch(color=INK, alpha=alphas[name], label=name) for name in names])
        _label(axes, "seconds a step (median)", "run")

    return _svg("Time of a step by phase", draw, height=1.3 + 0.4 * len(titles))


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
            style: dict[str, Any] = {"fmt": "d", "color": INK} if run is None else _mark(run)
            axes.errorbar([value], [row], xerr=error, markersize=5.5, elinewidth=1.2, capsize=3, **style)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        _label(axes, f"{unit}, 95% interval", "arm")

    return _svg(unit, draw, height=1.0 + 0.3 * len(labels))


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
                style = _mark(run, hollow=not right)
                axes.errorbar([value], [row], xerr=error, markersize=5.5, elinewidth=1.2, capsize=3, **style)
        axes.set_yticks(range(len(titles)), titles, parse_math=False)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        looks = {"right": {}, "wrong": {"markerfacecolor": "none"}}
        _kinds(axes, [(group, {"linestyle": "", "marker": "o"} | look) for group, look in looks.items()])
        _label(axes, unit, "run")

    return _svg(name, draw, height=1.3 + 0.4 * len(titles))
