"""A row of docs/convergence.md: what a run needed until its held-out divergence had halved."""

import json

import pytest

from benchmarks import row
from opd_jax.errors import UserError

LINES = [
    {"kind": "eval", "step": 0, "kl": 0.8},
    {"kind": "train", "step": 1, "seconds_step": 10.0, "response_tokens": 100},
    {"kind": "eval", "step": 1, "kl": 0.41},
    {"kind": "train", "step": 2, "seconds_step": 20.0, "response_tokens": 50},
    {"kind": "benchmark", "step": 2, "accuracy": 1.0},
    {"kind": "eval", "step": 2, "kl": 0.4},
    {"kind": "train", "step": 3, "seconds_step": 40.0, "response_tokens": 10},
    {"kind": "eval", "step": 3, "kl": 0.1},
]


@pytest.fixture
def workdir(tmp_path):
    """A run's folder, as far as the row reads it."""
    (tmp_path / "config.json").write_text(json.dumps({"seed": 4, "release": {"rule": "paper"}}))
    (tmp_path / "versions.json").write_text(
        json.dumps({"backend": "tpu", "devices": 4, "device_kind": "TPU v5e"})
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_a_run_counts_up_to_the_first_evaluation_with_half_of_the_starts_divergence():
    assert row.halved(LINES) == (2, 30.0, 150, 0.8, 0.4)
    assert row.halved(LINES[:4]) is None


def test_a_row_has_a_cell_for_each_column_of_the_page(workdir):
    cells = row.row(workdir, "mine.py").strip("|").split("|")
    heads = next(line for line in row.PAGE.read_text().splitlines() if line.startswith("| date"))
    assert len(cells) == len(heads.strip("|").split("|"))
    assert [cell.strip() for cell in cells[2:]] == [
        "4 × TPU v5e",
        "`mine.py`, `release.rule=paper`, seed 4",
        "0.800 → 0.400",
        "2",
        "0.5",
        "150",
    ]


def test_a_folder_without_a_run_or_a_run_that_has_not_halved_is_refused(workdir, tmp_path_factory):
    with pytest.raises(UserError, match="holds no run"):
        row.row(tmp_path_factory.mktemp("empty"), "mine.py")
    (workdir / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(UserError, match="train for more steps"):
        row.row(workdir, "mine.py")


def test_the_page_has_a_place_for_new_rows():
    assert row.PAGE.read_text().count(row.END) == 1
