"""The longer run: its arms, and what its figures and tables are made of."""

import itertools
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from opd_jax.config.flags import load
from opd_jax.run.run_record import read_run
from opd_jax.sweep import arms
from studies import longer, report
from tests import tiny

CONFIG = str(Path(__file__).parents[2] / "configs" / "smollm2.py")
REFERENCE = CONFIG.replace("smollm2.py", "smollm2_teacher.py")
STEPS = 9


def record(step, scores, accepted):
    """A rollout of sentences with two tokens and these margins each, half of it kept where it is released."""
    sentences = [{"text": "A b c. ", "tokens": 2, "kept": True, "contrast": x} for x in scores]
    tokens = 2 * len(scores)
    kept = tokens // 2 if accepted else tokens
    return {"step": step, "accepted": accepted, "tokens": tokens, "kept_tokens": kept, "sentences": sentences}


def train_line(step):
    """Three bins: two tokens in each, with a margin of 3, 2 and 1, and one nat more in late steps."""
    late = float(step > 6)
    return {
        "kind": "train",
        "step": step,
        "kl": 1.0 / step,
        "teacher_logp": -3.0 - late,
        "response_tokens": 6,
        "stop_probability": 0.01,
        "accepted_share": 0.5,
        "position_tokens": [2, 2, 2],
        "position_contrast_sum": [6 + 2 * late, 4 + 2 * late, 2 + 2 * late],
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "arm" / "seed-0"
    folder.mkdir(parents=True)
    evals = [
        {"kind": "eval", "step": step, "kl": kl, "kl_low": kl - 0.1, "kl_high": kl + 0.2}
        | {"finished_share": 0.5, "response_length": 20.0}
        for step, kl in ((0, 1.5), (STEPS, 0.75))
    ]
    answers = [
        {"step": step, "prompt": number, "response": text}
        for step, texts in ((0, ["a b c a b c", "no"]), (STEPS, ["a b c d", "a a a a a"]))
        for number, text in enumerate(texts)
    ]
    lines = {
        "metrics": [*map(train_line, range(1, STEPS + 1)), *evals],
        "evaluations": answers,
        "rollouts": [
            record(step, [9, 9, 0, 0] if step < 7 else [1, 1, 1, 1, 1, 1], step < 7)
            for step in range(1, STEPS + 1)
        ],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"release": {"min_segments": 4}}))
    return folder


def test_arms_start_from_one_student_and_differ_in_the_objective_alone():
    planned = arms.plan(CONFIG, load(CONFIG), "out")
    assert [run.config.objective.name for run in planned] == ["policy_gradient", "reverse_kl"]
    plain = [run.config.to_dict() | {"objective": None} for run in planned]
    assert plain[0] == plain[1]
    assert plain[0]["metrics"]["rollouts"] == plain[0]["rollout"]["batch"]  # every release point is on record


@pytest.mark.parametrize(
    ("text", "share"), [("a b c a b c", 3 / 4), ("a a a a a", 1 / 3), ("a b c d", 1), ("a\n b  c", 1)]
)
def test_distinct_is_the_share_of_word_trigrams_that_repeat_no_earlier_one(text, share):
    assert longer.distinct(text) == share


def test_a_text_without_a_trigram_counts_in_no_mean(workdir):
    assert math.isnan(longer.distinct("one word.".replace(" word", "")))
    assert [row["distinct"] for row in longer.evaluations(workdir)] == [3 / 4, (1 + 1 / 3) / 2]


def test_early_and_late_are_the_first_and_the_last_third_of_the_steps(workdir):
    assert longer.windows(read_run(workdir)) == {"early": [1, 2, 3], "late": [7, 8, 9]}
    assert longer.windows(read_run(workdir, "teacher")) == {"all": list(range(1, 10))}


def test_margins_are_those_of_a_windows_tokens_bin_by_bin(workdir):
    run = read_run(workdir)
    # Equal steps leave the bootstrap nothing to vary.
    np.testing.assert_allclose(longer.margins(run, [1, 2, 3]), [[3] * 3, [2] * 3, [1] * 3])
    mean, low, high = longer.margins(run, [6, 7]).T
    np.testing.assert_allclose(mean, [3.5, 2.5, 1.5])
    np.testing.assert_allclose([low, high], [[3, 2, 1], [4, 3, 2]])


def test_releases_are_counted_in_their_window_alone(workdir):
    run = read_run(workdir)
    early, late = (longer.released(run, steps) for steps in longer.windows(run).values())
    assert (early["accepted"], early["sentences"], early["responses"]) == (1, 4, 3)
    assert list(early["position_N"]) == [0.5] * 3
    assert (late["accepted"], late["shuffled"], list(late["position_N"])) == (0, 0, [])


def gain(score_N):
    """BIC0 - BIC1 of the best drop, from the textbook's residual sums in float64."""
    n = len(score_N)

    def rss(part):
        return ((part - part.mean()) ** 2).sum()

    splits = [(score_N[:t], score_N[t:]) for t in range(1, n)]
    drops = [rss(a) + rss(b) for a, b in splits if a.mean() > b.mean()]
    if not drops:
        return -np.inf
    return n * np.log((rss(score_N) + 1e-12) / (min(drops) + 1e-12)) - 2 * np.log(n)


def test_chance_is_that_of_all_orders_of_a_responses_sentences():
    scores = np.array([2.0, 1.8, 0.9, 0.5, 0.4])
    orders = [gain(np.array(order)) > 0 for order in itertools.permutations(scores)]
    assert 0.05 < np.mean(orders) < 0.5
    # 40 copies x 200 shuffles: a standard error below half a point.
    assert longer.accepted_when_shuffled([scores] * 40, 4) == pytest.approx(np.mean(orders), abs=0.02)
    assert longer.accepted_when_shuffled([scores] * 40, 6) == 0


def test_tables_have_a_row_an_evaluation_and_a_row_a_window(workdir):
    run = read_run(workdir, "arm")
    quality = longer.quality_table({"arm": longer.evaluations(workdir)}).splitlines()
    assert quality[2:] == [
        "| arm | 0 | 1.500 [1.400, 1.700] | 50% | 20 | 0.75 |",
        "| arm | 9 | 0.750 [0.650, 0.950] | 50% | 20 | 0.67 |",
    ]
    early, late = longer.window_table([run]).splitlines()[2:]
    assert early.startswith("| arm | 1–3 | 0.611 | -3.00 | 3.00, 1.00 | 100% of 3 | ")
    assert late == "| arm | 7–9 | 0.126 | -4.00 | 4.00, 2.00 | 0% of 3 | 0% | – | 6.0 |"


def test_the_reference_has_the_teachers_weights_and_does_not_change_them():
    config, trained = load(REFERENCE), load(CONFIG)
    assert (config.student.drop_layers, config.optimizer.learning_rate) == ((), 0)
    assert config.student.path == config.teacher.path
    assert 3 * config.train.steps == trained.train.steps
    assert config.data == trained.data and config.rollout == trained.rollout


def test_figures_name_their_axes_units_and_arms(workdir, tmp_path):
    run, found = read_run(workdir, "arm"), {"arm": longer.evaluations(workdir)}
    reference = read_run(workdir, "teacher")
    drawn = {
        "quality": lambda figure: longer.draw_quality(figure, found, [run], reference),
        "margin": lambda figure: longer.draw_margins(figure, [run], reference),
        "releases": lambda figure: longer.draw_releases(figure, [run], reference),
    }
    words = {
        "quality": {"step", "held-out KL, nats/token", "teacher's log-probability, nats/token", "arm"},
        "margin": {"teacher margin M, nats", "relative position in the response", "late, steps 7 to 9"},
        "releases": {
            "share of all responses",
            "early, steps 1 to 3: 100% released",
            "late, steps 7 to 9: 0% released",
            "the teacher's own responses: 67% released",
        },
    }
    for name, fill in drawn.items():
        report.draw(tmp_path, name, (8, 4), fill)
        svg = ElementTree.fromstring((tmp_path / f"{name}.svg").read_text())
        assert words[name] <= {node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")}


def test_a_folder_without_the_teachers_run_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "runs" / "policy_gradient" / "seed-0").mkdir(parents=True)
    done = tiny.entry("studies.longer", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "lacks teacher/seed-0" in done.stderr
    assert not (tmp_path / "out").exists()
