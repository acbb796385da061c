"""A report's figures as single files for notebooks and documents, with fixed colours and a key of the runs.

    python -m opd_jax.report.display --workdir=runs/release --out=docs/images/margin.svg

draws one recorded rollout, sentence by sentence;

    python -m opd_jax.report.display --long=runs/demo/long_answers.jsonl --out=docs/images/long_answers.svg

draws the long answers of `make demo`: the teacher's margin along them, and the part of each that is kept.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from opd_jax.errors import UserError, fail
from opd_jax.report import canvas, figures, rollout_profiles
from opd_jax.report import long as report_long
from opd_jax.report import page as report_page
from opd_jax.report.html import SIGNS
from opd_jax.report.rollouts import supervised
from opd_jax.run import Run, column, phase_seconds, read_lines, read_run, write_text

KEY_HEIGHT = 18  # height in points of the line that names the runs


class Svg(str):
    """An <svg> element that a notebook shows as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:  # a notebook stores this text with the picture
        return f"<Svg of {len(self):,} characters>"


def standalone(svg: str, titles: Sequence[str] = ()) -> Svg:
    """A report's figure in the page's light colours, on white, under a line that names the runs."""
    style = report_page.STYLE_FILE.read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w+);", style.split("@media")[0]))
    svg = re.sub(r"var\(--([\w-]+)\)", lambda match: light[match[1]], svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    if box is None:
        raise ValueError("the <svg> element has no viewBox that starts at 0 0")
    width, height = map(float, box.groups())
    top = KEY_HEIGHT if titles else 0
    key, x = [], 8
    for number, title in enumerate(titles):
        colour = light[f"run-{number % canvas.RUN_COLOURS}"]
        sign = SIGNS[number % len(SIGNS)]
        key.append(f'<text x="{x}" y="{13 - top}" fill="{colour}">{sign}</text>')
        key.append(f'<text x="{x + 13}" y="{13 - top}" fill="{light["ink"]}">{escape(title)}</text>')
        x += 30 + 5.5 * len(title)
    page = f'<rect y="{-top}" width="100%" height="100%" fill="{light["page"]}"/>'
    font = 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="9"'
    head = f"{page}<g {font}>{''.join(key)}</g>"
    svg = re.sub(r'height="[\d.]+pt"', f'height="{height + top}pt"', svg, count=1)
    svg = re.sub(r'viewBox="[^"]+"', f'viewBox="0 {-top} {width} {height + top}"', svg, count=1)
    return Svg(re.sub(r"(<svg [^>]*>)", lambda match: match[1] + head, svg, count=1))


def divergence(runs: Sequence[Run]) -> Svg:
    """KL of student from teacher over the steps, sampled and held out."""
    sampled = [column(run.train, "kl") for run in runs]
    return _of(runs, figures.kl(sampled, [run.evals for run in runs]), "KL")


def margin(runs: Sequence[Run]) -> Svg:
    """The teacher's margin over the relative position in the response."""
    profiles = [report_page.position_profile(run, report_page.mean_margin) for run in runs]
    return _of(runs, figures.position("Teacher margin M", "mean margin M, nats", profiles), "profile")


def releases(runs: Sequence[Run]) -> Svg:
    """Positions of accepted releases."""
    counts = [report_page.binned(run.train, "release_histogram") for run in runs]
    return _of(runs, figures.release_histogram(counts), "accepted release")


def times(runs: Sequence[Run]) -> Svg:
    """Seconds of each phase of a step."""
    return _of(
        runs, figures.phase_bars([run.title for run in runs], [phase_seconds(run) for run in runs]), "time"
    )


def _of(runs: Sequence[Run], svg: str | None, what: str) -> Svg:
    """The figure with the runs' key, or a line of text if there is nothing to draw."""
    if svg is None:
        words = f'<text x="4" y="14" font-family="sans-serif" font-size="11">No {what} was recorded.</text>'
        frame = 'xmlns="http://www.w3.org/2000/svg" width="240" height="20" viewBox="0 0 240 20"'
        return Svg(f"<svg {frame}>{words}</svg>")
    return standalone(svg, [run.title for run in runs])


def sentences(rollout: Mapping[str, Any]) -> Svg:
    """One rollout: the teacher's mean margin of each sentence, and where supervision ends."""
    return standalone(figures.sentence_margins(rollout["sentences"]))


def long_answers(records: Sequence[Mapping[str, Any]]) -> Svg:
    """Long answers: the teacher's margin along them, if recorded, and the part of each that is kept."""
    margin_3N = rollout_profiles.profile(records, rollout_profiles.margin)
    if margin_3N is None:
        return standalone(figures.answers(records))
    return standalone(figures.margin_and_answers(records, margin_3N))


def transcript(rollouts: Iterable[Mapping[str, Any]]) -> str:
    """Rollouts as text: each sentence with its supervision, its margin M and its advantage A in nats."""
    lines = []
    for rollout in rollouts:
        kept = f"{rollout['kept_tokens']} of {rollout['tokens']} tokens kept"
        lines += ["", f"PROMPT {' '.join(rollout['prompt'].split())}", f"({kept})"]
        lines += [
            f"{supervised(s):<8}  M {_nats(s['contrast'], 5)}"
            f"  A {_nats(s['advantage'], 6)}  {' '.join(s['text'].split())}"
            for s in rollout["sentences"]
        ]
    return "\n".join(lines[1:])


def _nats(value: float | None, width: int) -> str:
    return f"{value:{width}.2f}" if value is not None else f"{'–':>{width}}"


def clearest(rollouts: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The rollout whose release has the strongest evidence.

    Raises:
      UserError: there is no rollout.
    """
    ranked = sorted(rollouts, key=lambda r: (r["accepted"], r["gain"] or 0.0, len(r["sentences"])))
    if not ranked:
        raise UserError(
            "no rollout is recorded; train with metrics.rollouts and metrics.rollouts_every above 0"
        )
    return ranked[-1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m opd_jax.report.display", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run")
    source.add_argument("--long", help="long_answers.jsonl of a demo")
    parser.add_argument("--out", required=True, help="the .svg file")
    options = parser.parse_args(argv)
    try:
        if options.long:
            records = read_lines(Path(options.long))
            if not records or any("sentences" not in record for record in records):
                raise UserError(f"--long={options.long}: no answers there; name long_answers.jsonl of a demo")
            svg, text = long_answers(records), str(report_long.summarise(records))
        else:
            rollout = clearest(read_run(options.workdir).rollouts)
            svg, text = sentences(rollout), transcript([rollout])
        write_text(options.out, svg)
    except UserError as error:
        fail(error)
    print(text)


if __name__ == "__main__":
    main()
