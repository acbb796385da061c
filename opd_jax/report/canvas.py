"""What all plots of a report share: SVG text, colours, curves with marks, legends and the labels of axes.

Colours are drawn as placeholders, which CSS variables then replace: `--run-0`, `--run-1`, ... (one per run,
the same in every plot), `--ink`, `--muted` and `--grid`. Each run has a colour and a mark: colours repeat
after 8 runs, marks after 7.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Series = tuple[Sequence[int], Sequence[float]]  # steps, values

RUN_COLOURS = 8
INK, MUTED, GRID = "#111101", "#111102", "#111103"
MARKERS = "osD^vPX"  # 7, so that colour and mark together repeat after 56 runs
STEP = "training step"
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


def svg(name: str, draw: Callable[..., Any], height: float = 3.1, columns: int = 1) -> str:
    """Draws `columns` axes side by side, each 5.2 by `height` inches, and returns the <svg> element.

    Args:
      draw: called with all axes.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # ids differ between the plots of a page
        figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        text = text.replace(placeholder, f"var(--{variable})")
    text = re.sub(r"#1112(\d\d)", lambda match: f"var(--run-{int(match[1])})", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def legend(axes: Axes, handles: Sequence[Artist]) -> None:
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


def line_legend(axes: Axes, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """A legend of line kinds, in ink; the page explains the runs' colours."""
    legend(axes, [Line2D([], [], color=INK, label=label, **style) for label, style in entries])


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points, so that at most MOST_POINTS remain."""
    parts = min(len(x), MOST_POINTS)
    split_x, split_y = (np.array_split(np.asarray(v, float), parts) for v in (x, y))
    return np.array([part.mean() for part in split_x]), np.array([part.mean() for part in split_y])


def _smooth(y: np.ndarray) -> np.ndarray:
    """A centred running mean over a fifteenth of the points, narrower at both ends."""
    half = len(y) // 30
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def line(axes: Axes, series: Series, run: int, **style: Any) -> None:
    """One run's curve. If it has many points, its running mean, with the points drawn faintly."""
    steps, values = _thin(*series)
    if len(values) >= 40:
        axes.plot(steps, values, color=colour(run), linewidth=0.7, alpha=0.35)
        values = _smooth(values)
    axes.plot(steps, values, color=colour(run), **marks(run, len(values)) | style)


def marks(run: int, points: int) -> dict[str, Any]:
    """A few of the run's marks on a curve, at other places than the next run's."""
    every = max(1, points // 5)
    start = int(every * (0.618 * run % 1))
    return {"marker": MARKERS[run % len(MARKERS)], "markersize": 4.5, "markevery": (start, every)}


def mark(run: int, hollow: bool = False) -> dict[str, Any]:
    """The run's mark and colour, for a single value."""
    look = {"fmt": MARKERS[run % len(MARKERS)], "color": colour(run)}
    return look | {"markerfacecolor": "none"} if hollow else look


def label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == STEP:
        locator = axes.xaxis.get_major_locator()
        if isinstance(locator, ticker.MaxNLocator):
            locator.set_params(integer=True)
