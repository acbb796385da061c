"""HTML building blocks for the sections of a report."""

from collections.abc import Sequence
from html import escape
from typing import Any

from opd_jax.report import canvas, figures
from opd_jax.run import Run, column

SIGNS = "●■◆▲▼✚✖"  # as canvas.MARKERS draws them


def section(title: str, *body: str) -> str:
    return f"<section><h2>{title}</h2>\n{''.join(body)}</section>\n"


def panel(title: str, svg: str | None, note: str, empty: str) -> str:
    """One plot with its heading and how to read it; without a plot, the text `empty`."""
    body = svg if svg is not None else f'<p class="empty">{empty}</p>'
    return f"<figure><h3>{title}</h3>{body}<figcaption>{note}</figcaption></figure>\n"


def panels(runs: Sequence[Run], *drawn: str) -> str:
    """Panels in rows under a key of the runs."""
    keys = "".join(f"<span>{swatch(i)}{escape(run.title)}</span>" for i, run in enumerate(runs))
    return f'<p class="key">{keys}</p><div class="panels">{"".join(drawn)}</div>'


def words(runs: Sequence[Run], lines: Sequence[str]) -> str:
    """A line of HTML for each run."""
    items = "".join(
        f"<li>{swatch(i)}{escape(run.title)}: {line}</li>"
        for i, (run, line) in enumerate(zip(runs, lines, strict=True))
    )
    return f'<ul class="words">{items}</ul>'


def swatch(run: int) -> str:
    """A run's mark in its colour."""
    sign = SIGNS[run % len(SIGNS)]
    return f'<i class="swatch" style="color:var(--run-{run % canvas.RUN_COLOURS})">{sign}</i>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def curve(
    runs: Sequence[Run],
    name: str,
    unit: str,
    *keys: str,
    labels: Sequence[str] = (),
    **options: Any,
) -> str | None:
    """Curves of up to three metrics (solid, dashed, dotted); `labels` replace the metrics' names."""
    labels = labels or [key.replace("_", " ") for key in keys]
    kinds = [
        (label, style, [column(run.train, key) for run in runs])
        for key, label, style in zip(keys, labels, ("-", "--", ":"), strict=False)
    ]
    return figures.curves(name, unit, kinds, **options)
