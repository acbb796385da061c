"""The study: its sorting task, and what its report computes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from configs.study import sorting as sorting_config
from configs.study import sorting_rescale
from opd_jax.errors import UserError
from opd_jax.models.files import source
from studies import prune, releases, report, runs, sorting, tables

TEACHER = Path(__file__).parents[2] / "configs" / "study" / "models" / "teacher"


def test_a_solution_takes_one_number_a_sentence_and_ends_in_the_order():
    assert sorting.solution(["42", "17", "93"], True) == (
        "The smallest of 42 17 93 is 17. The smallest of 42 93 is 42. The smallest of 93 is 93. "
        "So the order is 17 42 93."
    )
    assert sorting.solution(["42", "17"], False) == (
        "The largest of 42 17 is 42. The largest of 17 is 17. So the order is 42 17."
    )


def test_solutions_of_generated_problems_end_in_pythons_order():
    for numbers, upwards in sorting.problems(50, seed=7):
        order = " ".join(sorted(numbers, key=int, reverse=not upwards))
        text = sorting.solution(numbers, upwards)
        assert text.endswith(f" So the order is {order}.")
        assert sorting.solution_of(sorting.question(numbers, upwards)) == text


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("A b 1. C 2. D 3.", None),
        ("A b 2. C 2. D 3.", 0),
        ("A b 1. C 2. D 4.", 2),
        ("A b 1. C 2.", 2),
        ("A b 1. C", 1),
        ("", 0),
        ("A b 1. C 2. D 3. E 4.", 3),
    ],
)
def test_the_first_error_is_the_first_sentence_that_differs_is_missing_or_too_much(response, number):
    assert sorting.first_error(response, "A b 1. C 2. D 3.") == number


def test_every_number_is_one_token_and_the_model_is_small(tmp_path):
    sorting.write_shape(tmp_path / "shape")
    tokenizer = sorting.make_tokenizer()
    for number in range(10, 100):
        assert len(tokenizer.encode(f" {number}")) == 1
    assert (tmp_path / "shape" / "tokenizer.json").read_bytes() == (TEACHER / "tokenizer.json").read_bytes()
    shape, teacher = source.config(f"random:{tmp_path / 'shape'}"), source.config(str(TEACHER))
    assert shape.replace(eos_ids=teacher.eos_ids) == teacher
    assert shape.parameter_count() < 3_000_000  # 12 MB in float32


def share_of(text):
    """--share of the command that prunes the study's student."""
    return float(re.search(r"studies.prune --model=models/teacher --share=(0\.\d+) ", text)[1])


def test_the_studys_student_is_its_teacher_pruned_as_the_model_card_says(tmp_path):
    share = share_of((TEACHER.parent / "README.md").read_text())
    assert share == share_of(prune.__doc__)
    prune.prune(TEACHER, share, tmp_path / "student")
    student = TEACHER.parent / "student"
    assert {path.name for path in student.iterdir()} == {path.name for path in TEACHER.iterdir()}
    for path in student.iterdir():
        assert path.read_bytes() == (tmp_path / "student" / path.name).read_bytes()


def test_pruning_sets_the_least_entries_of_a_matrix_to_zero_and_leaves_vectors():
    weight = np.array([[-4.0, 1.0], [0.5, -2.0], [3.0, 0.25]], np.float32)
    assert prune.pruned(weight, 0.5).tolist() == [[-4.0, 0.0], [0.0, -2.0], [3.0, 0.0]]
    assert prune.pruned(weight[0], 0.5).tolist() == [-4.0, 1.0]


def test_prompts_appear_when_all_files_are_complete(tmp_path, monkeypatch):
    """make study takes the file for a sign that nothing is left to write."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        sorting.write_problems(tmp_path)
    assert not (tmp_path / "prompts.jsonl").exists()
    monkeypatch.undo()
    sorting.write_problems(tmp_path)
    assert sum(1 for _ in (tmp_path / "prompts.jsonl").open()) > 3000


def test_problems_to_learn_from_and_to_distil_on_differ(tmp_path):
    sorting.write_problems(tmp_path)
    worked = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "worked.jsonl").open()]
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").open()]
    assert len(prompts) > 3500
    assert not set(worked) & set(prompts)


def rows(arm, seed, *points):
    """Evaluations of one run at steps 0, 1, ...: (accuracy, supervised tokens)."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "step": step,
            "accuracy": accuracy,
            "supervised_tokens": tokens,
            "response_tokens": 100 * step,
        }
        for step, (accuracy, tokens) in enumerate(points)
    ]


def test_arms_are_compared_seed_by_seed_at_equal_steps_and_at_equal_supervised_tokens():
    found = tables.table(
        rows("full", 0, (0.1, 0), (0.3, 100), (0.5, 200))
        + rows("full", 1, (0.1, 0), (0.2, 100), (0.3, 200))
        + rows("release", 0, (0.1, 0), (0.2, 25), (0.6, 50))
        + rows("release", 1, (0.1, 0), (0.2, 25), (0.2, 100)),
        "accuracy",
    )
    full, release = found
    assert (full["arm"], full["seeds"], full["value"], full["supervised_share"]) == ("full", 2, 0.4, 1.0)
    assert math.isclose(release["value"], 0.4)
    assert math.isclose(release["steps"], ((0.6 - 0.5) + (0.2 - 0.3)) / 2, abs_tol=1e-12)
    # Full supervision had 0.2 after 50 tokens with seed 0, and 0.2 after 100 with seed 1.
    assert math.isclose(release["tokens"], ((0.6 - 0.2) + (0.2 - 0.2)) / 2)
    assert math.isclose(release["supervised_share"], (50 + 100) / 2 / 200)
    low, high = release["steps_interval"]
    assert math.isclose(high, -low) and math.isclose(high, 12.7062 * 0.1, rel_tol=1e-4)


def test_a_cut_without_the_rescale_is_compared_with_itself_with_it_and_with_full_supervision():
    scaled = [
        *rows("full", 0, (0.1, 0), (0.5, 10)),
        *rows("full", 1, (0.1, 0), (0.7, 10)),
        *rows("prefix", 0, (0.1, 0), (0.25, 10)),
        *rows("prefix", 1, (0.1, 0), (0.75, 10)),
    ]
    without = rows("prefix+rescale=none", 1, (0.1, 0), (0.5, 10))
    without += rows("prefix+rescale=none", 0, (0.1, 0), (0.25, 10))
    (found,) = tables.rescaled(scaled, without, "accuracy")
    assert (found["arm"], found["seeds"], found["with"], found["without"]) == ("prefix", 2, 0.5, 0.375)
    assert math.isclose(found["less"], -0.125) and math.isclose(found["less_full"], -0.225)
    assert found["less_interval"] == pytest.approx((-0.125 - 12.7062 * 0.125, -0.125 + 12.7062 * 0.125), 1e-4)
    with pytest.raises(UserError, match=r"lacks prefix/seed-1, which prefix\+rescale=none .* compared"):
        tables.rescaled(scaled[:-2], without, "accuracy")


def test_the_arms_without_the_rescale_are_those_of_the_study_that_cut():
    given = sorting_config.get_config()
    known, without = sorting_config.arms(given), sorting_rescale.arms(sorting_rescale.get_config())
    truncating = {"release", "shuffled", "random", "prefix", "suffix", "advantage_std"}
    assert {name.partition("+")[0] for name in without} == truncating
    for name, overrides in without.items():
        assert overrides == known[name.partition("+")[0]] | {"release.rescale": "none"}
    assert given.release.rescale == "sequence" and sorting_rescale.get_config() == given


def test_the_share_of_releases_is_that_of_wrong_and_of_right_responses_with_each_seeds():
    logged = [
        {"seed": seed, "first_error": error, "accepted": accepted}
        for seed, error, accepted in [(0, 2, True), (0, 1, False), (1, 0, True), (0, None, False)]
    ]
    assert releases.shares(logged) == {"with an error": (2 / 3, [0.5, 1.0]), "without": (0.0, [0.0])}
    assert list(releases.shares(logged[:3])) == ["with an error"]


def test_margins_are_those_around_the_error_beside_right_ones_of_the_same_sentence_numbers():
    right = {"first_error": None, "margins": [10.0, 20.0, 30.0]}
    wrong = {"first_error": 1, "margins": [9.0, 5.0, 7.0]}
    found = releases.margins_around_errors([right, right, wrong])
    assert found == {-1: (9.0, 10.0, 1), 0: (5.0, 20.0, 1), 1: (7.0, 30.0, 1)}


def test_chance_exchanges_release_points_between_responses_of_equal_length():
    alone = [{"sentences": n, "kept": n, "first_error": n - 1} for n in (3, 4, 5)]
    assert releases.by_chance(alone) == ((0.0, 1.0), (1.0, 1.0))  # nothing to exchange with
    pair = [{"sentences": 6, "kept": k, "first_error": k} for k in (1, 5)]
    (at, at_p), (distance, distance_p) = releases.by_chance(pair)
    assert 0.4 < at < 0.6 and math.isclose(distance, 4 * (1 - at))
    assert at_p == distance_p == (1 + at * releases.EXCHANGES) / (1 + releases.EXCHANGES)


def test_p_values_are_those_of_scipys_permutation_test():
    rng = np.random.default_rng(5)
    errors, moved = rng.integers(0, 6, 40), rng.integers(0, 3, 40)
    rows = [{"sentences": 6, "kept": e + m, "first_error": e} for e, m in zip(errors, moved, strict=True)]
    rng.shuffle(late := errors + moved)
    rows += [{"sentences": 7, "kept": k, "first_error": e} for k, e in zip(late, errors, strict=True)]
    (_, at_p), (_, distance_p) = releases.by_chance(rows[40:])
    options = {"permutation_type": "pairings", "n_resamples": 5000, "vectorized": False, "rng": 1}
    for p, statistic, side in (
        (at_p, lambda kept: np.mean(kept == errors), "greater"),
        (distance_p, lambda kept: np.mean(np.abs(kept - errors)), "less"),
    ):
        theirs = scipy.stats.permutation_test((late,), statistic, alternative=side, **options)
        assert abs(p - theirs.pvalue) < 0.12  # three standard errors of 200 draws
    (_, at_p), (_, distance_p) = releases.by_chance(rows[:40])
    assert at_p < 0.02 and distance_p == 1 / (1 + releases.EXCHANGES)


def write_run(workdir, steps=2, **files):
    """A sorting run whose evaluations at steps 0 and `steps` hold one right response."""
    workdir.mkdir(parents=True)
    numbers = ["42", "17"]
    text = sorting.question(numbers, True)
    evals = [
        {"kind": "eval", "step": step, "kl": 0.5, "teacher_logp": -0.25}
        | {"response_length": 9.0, "finished_share": 1.0}
        for step in (0, steps)
    ]
    train = {"kind": "train", "supervised_tokens": 9, "response_tokens": 9, "accepted_share": 0.0}
    lines = [evals[0], *(train | {"step": step} for step in range(1, steps + 1)), evals[1]]
    answer = {"text": text, "response": sorting.solution(numbers, True) + "<|end|>"}
    files |= {"metrics": lines, "evaluations": [answer | {"step": step} for step in (0, steps)]}
    for name, rows in files.items():
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_sweep_is_read_arm_by_arm_with_the_accuracy_of_each_evaluation(tmp_path):
    for seed in (10, 9):
        write_run(tmp_path / "full" / f"seed-{seed}")
    found = runs.read_sweep("sorting", tmp_path)
    assert [(row["seed"], row["step"], row["accuracy"]) for row in found] == [
        (9, 0, 1.0),
        (9, 2, 1.0),
        (10, 0, 1.0),
        (10, 2, 1.0),
    ]


def test_sweeps_that_cannot_be_reported_are_refused_in_one_line_that_names_them(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match=rf"^--pair={missing} holds no run .* by --pair=$"):
        runs.read_sweep("pair", missing)
    (tmp_path / "full" / "seed-0").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^--sorting={tmp_path}/full/seed-0: no metrics.jsonl"):
        runs.read_sweep("sorting", tmp_path)
    write_run(tmp_path / "lone" / "release" / "seed-0")
    (tmp_path / "lone" / "full" / "seed-old").mkdir(parents=True)  # no run of the sweep's
    with pytest.raises(UserError, match=r"lone lacks the arm full,"):
        runs.read_sweep("sorting", tmp_path / "lone")
    write_run(tmp_path / "begun" / "full" / "seed-0")
    metrics = tmp_path / "begun" / "full" / "seed-0" / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"eval"' not in line))
    with pytest.raises(UserError, match=r"begun: full/seed-0 did not come as far as step 0;"):
        runs.read_sweep("sorting", tmp_path / "begun")
    write_run(tmp_path / "short" / "full" / "seed-0", steps=3)
    write_run(tmp_path / "short" / "release" / "seed-0", steps=2)
    with pytest.raises(UserError, match=r"short: release/seed-0 did not come as far as step 3;"):
        runs.read_sweep("sorting", tmp_path / "short")
    with pytest.raises(UserError, match=r"no rollouts.jsonl in release/seed-N"):
        runs.read_rollouts(tmp_path / "short")
    (tmp_path / "short" / "release" / "seed-1").mkdir()
    with pytest.raises(UserError, match=r"^--sorting=.*/seed-1: no metrics.jsonl"):
        runs.read_rollouts(tmp_path / "short")


def run_module(command, folder, *arguments):
    """The finished `python -m` of a module of this repository, run in a folder."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", command.__name__, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_report_of_both_sorting_sweeps_shows_the_rescale_and_every_axis_has_a_unit(tmp_path):
    texts = ("The smallest of 42 17 is 42.", " The smallest of 17 is 17.")
    sentences = [{"text": text, "kept": not at, "contrast": 1.0} for at, text in enumerate(texts)]
    record = {"prompt": sorting.question(["42", "17"], True), "sentences": sentences, "step": 1, "gain": 1.0}
    for arm in ("sorting/full", "sorting/release", "sorting_rescale/release+rescale=none"):
        for seed in (0, 1):
            write_run(tmp_path / arm / f"seed-{seed}", rollouts=[record | {"accepted": True}])
    sweeps = [f"--{name}={name}" for name in ("sorting", "sorting_rescale")]
    done = run_module(report, tmp_path, *sweeps, "--pair=", "--out=out")
    assert done.returncode == 0, done.stderr
    assert "| release | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | +0.000" in done.stdout
    labels = {
        "sorting_shares": "share with an accepted release",
        "sorting_margin": "place, sentences after the first wrong one",
        "sorting_release": "first released sentence minus first wrong one, sentences",
        "sorting_rescale": "difference of held-out KL, nats/token",
        "sorting_curves": "supervised tokens, thousands",
    }
    assert {path.stem for path in (tmp_path / "out").glob("*.svg")} == set(labels)
    for name, label in labels.items():
        assert f">{label}<" in (tmp_path / "out" / f"{name}.svg").read_text()
    assert (tmp_path / "out" / "sorting_rescale_runs.csv").read_text().count("\n") == 5


def test_a_sweep_that_releases_in_no_wrong_response_leaves_no_plot_of_another_sweeps_releases(tmp_path):
    sentence = {"text": "The smallest of 42 17 is 42.", "kept": True, "contrast": 1.0}
    record = {"prompt": sorting.question(["42", "17"], True), "sentences": [sentence], "step": 1, "gain": 0.0}
    for arm in ("full", "release"):
        write_run(tmp_path / "runs" / arm / "seed-0", rollouts=[record | {"accepted": False}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sorting_release.svg").touch()
    done = run_module(report, tmp_path, "--sorting=runs", "--sorting_rescale=", "--pair=", "--out=out")
    assert done.returncode == 0 and "1 rollouts, 1 with an error; released with an error: 0%" in done.stdout
    plots = {"sorting_curves.svg", "sorting_margin.svg", "sorting_shares.svg"}
    names = plots | {"sorting_runs.csv", "sorting_rollouts.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (report, ["--sorting=nowhere"], "--sorting=nowhere holds no run"),
        (report, ["--sorting=", "--pair="], "--sorting= and --pair= leave nothing to report"),
        (sorting, ["--out=taken/more"], "--out=taken/more cannot be written"),
        (prune, [f"--model={TEACHER}", "--share=0.5", "--out=taken/a"], "--out=taken/a cannot be written"),
        (prune, ["--model=nowhere", "--share=0.5", "--out=new"], "--model=nowhere: no model.safetensors"),
        (prune, ["--model=nowhere", "--share=1.5", "--out=new"], "--share=1.5: give the share"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(tmp_path, command, arguments, message):
    (tmp_path / "taken").write_text("a file")
    done = run_module(command, tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
