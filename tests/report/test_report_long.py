"""What a report says of long answers."""

import json
import math

import numpy as np
import pytest

from opd_jax.report import build as report
from opd_jax.report import display as report_display
from opd_jax.report import long as report_long
from tests.report.test_report import train_line, write_run


def record(margins, kept: int, tokens: int = 10, **more) -> dict:
    """An answer of one sentence a margin, `tokens` tokens each, of which the first `kept` stay."""
    sentences = [
        {
            "text": f"Sentence {i}. ",
            "tokens": tokens,
            "kept": i < kept,
            "kept_tokens": tokens * (i < kept),
            "contrast": margin,
            "advantage": -margin / 10,
            "advantage_std": 0.5,
        }
        for i, margin in enumerate(margins)
    ]
    cut = kept < len(margins)
    return {
        "step": 0,
        "prompt": "Why <b>?",
        "finished": False,
        "accepted": cut,
        "gain": 5.0 if cut else 0.0,
        "kept_tokens": tokens * kept,
        "tokens": tokens * len(margins),
        "sentences": sentences,
    } | more


RECORDS = [record([2, 2, 2, 1, 1], kept=3), record([2, 2, 2, 2, 2], kept=5), record([4, 2, 1, 1, 1], kept=1)]


def test_the_summary_is_the_sums_by_hand():
    found = report_long.summarise(RECORDS)
    assert (found.answers, found.tokens, found.sentences) == (3, 50, 5)
    np.testing.assert_allclose(found.margin, [8 / 3, 2, 5 / 3, 4 / 3, 4 / 3])
    np.testing.assert_allclose(found.advantage, np.array(found.margin) / -10)
    assert found.accepted == pytest.approx(2 / 3)
    assert found.kept == pytest.approx((3 / 5 + 1 / 5) / 2)
    assert found.released == pytest.approx((20 + 40) / 150)
    said = ("2.67 2.00 1.67 1.33 1.33 nats", "releases 67% of the answers", "keeps 40%", "40% of all tokens")
    assert all(words in str(found) for words in said)


def test_fifths_are_of_each_answers_own_length():
    found = report_long.summarise([record([3, 1], kept=2, tokens=5), record([3, 1], kept=2, tokens=20)])
    np.testing.assert_allclose(found.margin, [3, 3, 2, 1, 1])


def test_answers_without_a_release_are_said_to_have_none():
    found = report_long.summarise([record([1, 1, 1], kept=3)])
    assert math.isnan(found.kept) and found.released == 0
    assert "No answer has an accepted release." in str(found)


def test_the_section_stands_first_on_the_page_and_escapes_what_models_wrote(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_run(tmp_path / "run", [train_line(step, rng, True) for step in range(1, 5)])
    page = report.build([folder], tmp_path / "page.html", lead=report_long.section(RECORDS)).read_text()
    assert page.index("Long answers") < page.index("Summary")
    assert "Why &lt;b&gt;?" in page and "Why <b>?" not in page
    assert report_long.section([]) == ""


def test_the_picture_of_long_answers_is_one_command(tmp_path, capsys):
    lines = tmp_path / "long.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    report_display.main([f"--long={lines}", f"--out={tmp_path / 'picture.svg'}"])
    assert "3 answers" in capsys.readouterr().out
    svg = (tmp_path / "picture.svg").read_text()
    assert svg.startswith("<svg") and "teacher margin" in svg and "var(--" not in svg


def test_a_file_without_answers_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report_display.main([f"--long={tmp_path / 'absent'}", f"--out={tmp_path / 'picture.svg'}"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "long_answers.jsonl" in error
