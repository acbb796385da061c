"""What a report says of rollouts that stop."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from opd_jax.report import build as report
from tests.report.test_report import rollout, train_line, write_run


def stopping_line(step: int, audit_rows: int) -> dict:
    line = train_line(step, np.random.default_rng(0), released=True) | {
        "response_tokens": 400,
        "response_length": 50.0,
        "stopped_share": 0.5,
        "finished_share": 0.25,
        "limit_share": 0.25,
        "audit_rows": audit_rows,
        "audit_length": 120.0 if audit_rows == 1 else 80.0,
        "audit_agreement": 1.0 if audit_rows == 1 else 0.5,
        "audit_written": 60.0,
    }
    if not audit_rows:
        line |= dict.fromkeys(("audit_length", "audit_agreement", "audit_written"))
    return line


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base = tmp_path_factory.mktemp("stopping")
    lines = [stopping_line(step, audit_rows=step % 3) for step in range(1, 7)]
    rows = [
        rollout(6, stopped=True, audit=False, finished=False),
        rollout(6, stopped=False, audit=True),
        rollout(1, stopped=False, audit=False, accepted=False),
    ]
    runs = [
        write_run(base / "stops", lines, rollouts=rows),
        write_run(base / "whole", [train_line(1, np.random.default_rng(0), True)]),
    ]
    return report.build(runs, base / "report.html").read_text(encoding="utf-8")


def test_what_was_saved_follows_from_the_audited_rows(page):
    """Two rows of 120 tokens and four of 80; 48 rollouts, in 6 steps of 8."""
    text = re.sub("<.*?>", "", page)
    assert "50% of the rollouts stopped, 25% finished, 25% reached the length limit" in text
    length = (2 * 120 + 4 * 80) / 6
    assert f"2,400 tokens written of about {length * 48:,.0f} (54%)" in text
    assert "6 audited ones" in text and "have 93 tokens on average" in text
    assert f"would take {2 * (length * 48 / 2400 - 1):.3g} s more a step" in text
    assert "in 67% of the audited rollouts" in text
    assert "every rollout is written to its end" in text


def test_rows_are_drawn_with_what_was_not_written(page):
    (plot,) = re.findall(r'<svg [^>]*aria-label="Kept, released and unwritten.*?</svg>', page, re.DOTALL)
    ElementTree.fromstring(plot)
    assert "2 rollouts of the step" in plot
    assert "stopped</p>" in page and "finished</p>" in page


def test_runs_without_stops_say_how_to_have_them(tmp_path):
    run = write_run(tmp_path / "run", [train_line(1, np.random.default_rng(0), True)])
    page = report.build([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "release.stop=never" in page
