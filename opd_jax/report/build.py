"""Builds the page of one or several workdirs."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import UserError, fail
from opd_jax.report import page as report_page
from opd_jax.run import read_run, summary, write_text


def build(
    workdirs: Sequence[str | Path],
    out: str | Path,
    titles: Sequence[str] | None = None,
    summary_rows: Sequence[Mapping[str, Any]] | None = None,
    answers: Sequence[Mapping[str, Any]] | None = None,
    lead: str = "",
) -> Path:
    """Writes the page of `workdirs` to `out` and returns its path.

    Args:
      titles: a name for each workdir; the folders' names by default.
      summary_rows: further columns of the summary, one {column: value} for each workdir.
      answers: replies of several models to the same prompts, each {"prompt": text, "answers": {label: text}}.
      lead: HTML that comes before everything else.

    Raises:
      UserError: a workdir holds no run, or `out` cannot be written.
    """
    titles = list(titles) if titles is not None else _default_titles(workdirs)
    runs = [read_run(folder, title) for folder, title in zip(workdirs, titles, strict=True)]
    rows = [summary(run) for run in runs]
    for row, extra in zip(rows, summary_rows or [{}] * len(rows), strict=True):
        row.update({key: str(value) for key, value in extra.items()})
    write_text(out, report_page.render(runs, rows, answers or [], lead))
    return Path(out)


def _default_titles(workdirs: Sequence[str | Path]) -> list[str]:
    """Folder names; duplicates get their parent's name too."""
    paths = [Path(workdir).resolve() for workdir in workdirs]
    names = [path.name for path in paths]
    return [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in paths]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m opd_jax.report", description=__doc__)
    parser.add_argument("--workdir", action="append", required=True, help="a run; may be repeated")
    parser.add_argument("--out", help="the page; default: report.html in the first workdir")
    options = parser.parse_args(argv)
    try:
        page = build(options.workdir, options.out or Path(options.workdir[0]) / "report.html")
    except UserError as error:
        fail(error)
    print(page)
