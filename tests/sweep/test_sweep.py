"""Sweeps: arms and their names, what is skipped and resumed, the table, and job files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from opd_jax import config, release
from opd_jax.distill import objectives
from opd_jax.errors import UserError
from opd_jax.release import rules
from opd_jax.report import figures as report_figures
from opd_jax.sweep import arms
from opd_jax.sweep import runs as sweep
from opd_jax.sweep import table as sweep_table
from tests import tiny

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs" / "ablations" / "paper.py"
ABLATIONS = sorted(set((ROOT / "configs" / "ablations").glob("[a-z]*.py")) - {PAPER})
STEPS = 8


@pytest.fixture(scope="module")
def ablation(models, tmp_path_factory):
    """An ablation file of two arms and two seeds on the tiny pair."""
    questions = models / "sweep_questions.jsonl"
    questions.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?", "answer": "4"}\n')
    answered = models / "answered.jsonl"
    lines = (models / "prompts.jsonl").read_text().splitlines()
    answered.write_text("".join(json.dumps(json.loads(line) | {"answer": "7"}) + "\n" for line in lines))
    path = tmp_path_factory.mktemp("ablation") / "ablation.py"
    path.write_text(
        "from pathlib import Path\nfrom tests import tiny\n\nSEEDS = (0, 1)\n\n\n"
        "def get_config(arg=None):\n"
        f"    c = tiny.config(Path({str(models)!r}))\n"
        f"    c.train.steps = {STEPS}\n    c.checkpoint.every = 2\n    c.eval.every = 8\n"
        f"    c.eval.benchmark = ('ours:{questions}', 'heldout')\n    c.data.prompt_tokens = 128\n"
        f"    c.data.path = {str(answered)!r}\n"
        "    return c\n\n\n"
        "def arms(config):\n"
        "    return {'full': {'release.rule': 'none'}, 'half': {'release.rule': 'prefix',"
        " 'release.prefix_fraction': 0.5}}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(ablation, tmp_path_factory):
    """(folder, standard output) of a whole sweep."""
    out = tmp_path_factory.mktemp("whole")
    done = tiny.entry("opd_jax.sweep", f"--config={ablation}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def rows(out):
    """The table without its times."""
    with open(out / "table.csv") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith("seconds ")}
            for row in csv.DictReader(file)
        ]


def results(folder, name):
    """Share of right responses in a benchmark's file, by hand."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return np.mean([right for line in lines for right in line["right"]])


def test_the_table_has_every_arm_with_the_means_of_its_runs(finished):
    out, said = finished
    _, full, half, _ = rows(out)
    assert (full["arm"], half["arm"], full["seeds"]) == ("full", "half", "2")
    for row in (full, half):
        last = []
        for seed in (0, 1):
            lines = (out / row["arm"] / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
            last.append([r for r in map(json.loads, lines) if r["kind"] == "eval"][-1]["kl"])
        assert float(row["KL"]) == pytest.approx(np.mean(last), rel=1e-5)
        assert float(row["KL low"]) < float(row["KL"]) < float(row["KL high"])
    assert full["KL difference"] == ""
    assert float(half["KL difference"]) == pytest.approx(float(half["KL"]) - float(full["KL"]), abs=0.02)
    assert 0.4 < float(half["supervised share"]) < 0.65
    for name in ("ours", "heldout"):
        right = [results(out / "half" / f"seed-{seed}" / "benchmarks", f"{name}-{STEPS}") for seed in (0, 1)]
        assert float(half[name]) == pytest.approx(np.mean(right))
    assert float(half["mean"]) == pytest.approx((float(half["ours"]) + float(half["heldout"])) / 2)
    assert "mean difference" in half
    assert "| full |" in said
    page = (out / "report.html").read_text()
    assert page.count("95% interval") >= 3
    assert "Where the configs differ" in page


def test_the_table_begins_with_the_start_and_ends_with_the_teacher(finished):
    out, _ = finished
    start, *_, teacher = rows(out)
    assert (start["arm"], teacher["arm"]) == ("start", "teacher")
    first = []
    for seed in (0, 1):
        lines = (out / "full" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        first.append(next(r["kl"] for r in map(json.loads, lines) if r["kind"] == "eval"))
    assert float(start["KL"]) == pytest.approx(np.mean(first), rel=1e-5)
    assert float(teacher["ours"]) == results(out / "teacher", "ours-model")
    assert (start["supervised tokens"], teacher["KL"], teacher["seeds"]) == ("", "", "1")
    # Its answers are the teacher's own, drawn as the student's.
    said = [json.loads(line) for line in (out / "teacher" / "ours-model.jsonl").read_text().splitlines()]
    students = (out / "full" / "seed-0" / "benchmarks" / "ours-0.jsonl").read_text().splitlines()
    assert [r["text"] for r in said] == [json.loads(line)["text"] for line in students]
    assert [r["responses"] for r in said] != [json.loads(line)["responses"] for line in students]


def test_the_teacher_answers_once_and_again_where_its_settings_change(finished, ablation, tmp_path, capsys):
    shutil.copytree(finished[0] / "teacher", tmp_path / "teacher")
    (planned,) = runs(ablation, tmp_path, ["full"], [0])
    sweep.benchmark_teacher(planned, tmp_path)
    assert capsys.readouterr().out == ""
    planned.config.eval.benchmark = ()
    sweep.benchmark_teacher(planned, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Moments to be killed at, each in what the one before left, from the first record to the table.
MOMENTS = {
    "in the first record": ("line", '"kind": "eval", "step": 0'),
    "with a checkpoint written and not yet named": ("os.rename", "full/seed-0/checkpoints/4"),
    "in the last record before the last checkpoint": ("line", f'"kind": "eval", "step": {STEPS}'),
    "between two runs": ("os.mkdir", "half/seed-1'"),
    "in the table": ("open", "table.md"),
}


def test_a_sweep_killed_again_and_again_and_started_again_gives_the_same_table(finished, ablation, tmp_path):
    arguments = "opd_jax.sweep", f"--config={ablation}", f"--out={tmp_path}"
    for moment, (event, text) in MOMENTS.items():
        killed = tiny.entry("tests.killed", event, text, *arguments)
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stderr}"
        if moment == "in the last record before the last checkpoint":
            kill_past_a_checkpoint(arguments, tmp_path / "full" / "seed-1" / "checkpoints")
    first = (tmp_path / "full" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    again = tiny.entry(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": done") == 4
    assert (tmp_path / "full" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == first
    assert rows(tmp_path) == rows(finished[0])


def kill_past_a_checkpoint(arguments, folder):
    """Starts the sweep and kills it from outside, at no chosen moment past a run's first checkpoint."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = tiny.entry(*arguments, start=subprocess.Popen, **quiet)
    for _ in range(20_000):
        if any(path.name.isdigit() for path in folder.glob("*")):
            break
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def runs(ablation, out, only=(), seeds=()):
    return arms.plan(str(ablation), config.load(str(ablation)), out, only, seeds)


def test_a_finished_sweep_started_again_runs_nothing_and_says_the_same(finished, ablation, capsys):
    out, said = finished
    planned = runs(ablation, out)
    sweep.train_all(planned)
    assert capsys.readouterr().out.count(": done") == 4
    assert sweep_table.write(planned, out).partition("| arm |")[2] in said.partition("| arm |")[2]


def test_job_files_are_whole_commands_that_end_as_the_sweep_does(finished, ablation, tmp_path):
    planned = runs(ablation, tmp_path, ["half"], [1])
    (job,) = sweep.write_jobs(planned, tmp_path / "jobs", str(ablation), [])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = tiny.entry(job, command=["sh"], cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert sweep.write_jobs(planned, tmp_path / "jobs", str(ablation), []) == []
    alone, whole = (out / "half" / "seed-1" / "metrics.jsonl" for out in (tmp_path, finished[0]))
    losses = [
        [r["loss"] for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "train"]
        for path in (alone, whole)
    ]
    assert losses[0] == losses[1]


def test_changes_of_the_command_line_reach_job_files_in_every_spelling():
    words = ["x", "--config=a.py", "--config.train.steps", "7", "--config.seed=3"]
    words += ["--config.metrics.tensorboard", "--noconfig.train.x", "--out=b", "--config.mesh.data", "-1"]
    assert sweep.changes_of(words) == [
        "--config.train.steps=7",
        "--config.seed=3",
        "--config.metrics.tensorboard",
        "--noconfig.train.x",
        "--config.mesh.data=-1",
    ]


def test_job_files_of_a_pod_launch_every_arm_of_the_papers_table(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path = "configs/ablations/paper.py"
    planned = arms.plan(path, config.load(path), "/shared/runs/paper")
    settings = tmp_path / "settings.sh"
    settings.write_text((ROOT / "launch" / "settings.example.sh").read_text().replace("ZONE=", "ZONE=a", 1))
    settings.write_text(settings.read_text().replace("PROJECT=", "PROJECT=mine", 1))
    files = sweep.write_jobs(planned, tmp_path / "jobs", f"{path}:/shared", [], settings)
    assert len(files) == len(planned) == 12
    assert {run.mean for run in planned} == {("aime25", "hmmt25_feb", "hmmt25_nov", "math500", "minerva")}
    # Read as launch/tpu.sh and the worker read them.
    file = next(file for file in files if file.stem == "1.7B-prefix_2048-seed-0")
    assert file.read_text().startswith(f"# SETTINGS={file} launch/tpu.sh run\n")
    environment = os.environ | {"SETTINGS": str(file)}
    show = "set -euo pipefail; . launch/common.sh; read_settings $SETTINGS; "
    show += 'printf \'%s\\n\' "$NAME" --config="$CONFIG" "${CONFIG_ARGS[@]}" --workdir="$WORKDIR"'
    told = subprocess.run(["bash", "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [
        "opd-first-1-7b-prefix-2048-seed-0",
        "--config=configs/ablations/paper.py:/shared",
        "--config.student.path=/shared/models/Qwen3-1.7B",
        "--config.release.rule=prefix",
        "--config.release.prefix_tokens=2048",
        "--config.seed=0",
        "--workdir=/shared/runs/paper/1.7B-prefix_2048/seed-0",
    ]
    dry = ["bash", "launch/tpu.sh", "--dry-run", "run"]
    done = subprocess.run(dry, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_papers_table_compares_each_student_with_its_own_full_supervision(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path = "configs/ablations/paper.py"
    planned = arms.plan(path, config.load(path), tmp_path)
    assert {run.against for run in planned if run.arm.startswith("8B")} == {"8B-full"}
    for run in planned:
        assert run.config.student.path.endswith(run.arm.partition("-")[0])
        sizes = run.config.data.prompt_tokens + run.config.rollout.max_tokens, run.config.rollout.batch
        assert sizes == (16384, 1024), "the paper's context and prompts a step"


def test_a_sweep_over_another_one_is_refused(finished, ablation):
    base = config.load(str(ablation))
    base.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match="optimizer.learning_rate"):
        sweep.train_all(arms.plan(str(ablation), base, finished[0]))


def test_a_run_that_lacks_its_last_benchmark_is_not_done(finished, ablation, tmp_path):
    shutil.copytree(finished[0] / "full" / "seed-0", tmp_path / "full" / "seed-0")
    (planned,) = runs(ablation, tmp_path, ["full"], [0])
    assert sweep.is_done(planned)
    path = planned.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = f'"kind": "benchmark", "step": {STEPS}'
    path.write_text("".join(line for line in lines if last not in line))
    assert not sweep.is_done(planned)


def test_an_alarm_in_the_last_step_stands_for_no_evaluation(finished, ablation, tmp_path):
    shutil.copytree(finished[0] / "full" / "seed-0", tmp_path / "full" / "seed-0")
    (planned,) = runs(ablation, tmp_path, ["full"], [0])
    path = planned.workdir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    alarm = {"kind": "alarm", "step": STEPS, "alarm": "finished_share", "of": "eval", "value": 0}

    def done(*left_out):
        kept = [r for r in [*records, alarm] if (r["kind"], r["step"]) not in left_out]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return sweep.is_done(planned)

    assert done() and not done(("eval", STEPS))


def test_an_arm_that_was_never_evaluated_has_a_row_without_results(finished, ablation, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for planned in runs(ablation, tmp_path, ["half"]):
        (planned.workdir / "evaluations.jsonl").unlink()
        shutil.rmtree(planned.workdir / "benchmarks")
        path = planned.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["kind"] == "train"))
    assert "| half |" in sweep_table.write(runs(ablation, tmp_path), tmp_path)
    _, full, half, _ = rows(tmp_path)
    assert full["KL"] and not half["KL"] and "KL difference" not in full
    assert float(half["supervised tokens"]) > 0


def test_every_rule_objective_and_rescale_has_an_arm(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)

    def values(name, key):
        path = f"configs/ablations/{name}.py"
        return {config.get(run.config, key) for run in arms.plan(path, config.load(path), tmp_path)}

    assert values("rule", "release.rule") == set(rules.RULES)
    assert values("objective", "objective.name") == set(objectives.OBJECTIVES)
    assert values("rescale", "release.rescale") == set(release.RESCALES)
    assert values("rescale", "release.rule") == set(rules.RULES)


RECIPES = ("one_chip", "small_pod", "dense", "paper", "paper_4b", "paper_8b", "smollm2", "study/sorting")


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_plans_on_the_demos_pair_and_tells_its_cost(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    planned = arms.plan(str(path), config.load(str(path)), tmp_path)  # every arm is checked
    assert len({run.workdir for run in planned}) == len(planned)
    assert len({json.dumps(run.config.to_dict(), sort_keys=True) for run in planned}) == len(planned)
    assert f"Cost: {len(planned)} runs of" in path.read_text()


def test_the_papers_table_tells_the_cost_of_the_recipes_it_runs():
    planned = arms.plan(str(PAPER), config.load(str(PAPER)), "out")

    def a_step(recipe):
        cost = re.search(r"Cost: at least (\d\.\d\d) ", (ROOT / f"configs/{recipe}.py").read_text())
        return float(cost[1])

    hours = {"1.7B": a_step("paper"), "4B": a_step("paper_4b"), "8B": a_step("paper_8b")}
    total = sum(100 * hours[run.arm.partition("-")[0]] for run in planned)
    text = " ".join(PAPER.read_text().split())
    steps = "{:.2f}, {:.2f} or {:.2f}".format(*hours.values())
    assert f"Cost: {len(planned)} runs of 100 steps, {steps} v5p chip-hours a step" in text
    assert f": {round(total, -2):.0f} chip-hours" in text


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_plans_on_every_recipe_by_one_override(path, recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = f"configs/{recipe}.py"
    planned = arms.plan(str(path), config.load(str(path), file), tmp_path)
    assert {run.config.student.path for run in planned} == {config.load(file).student.path}
    assert len({json.dumps(run.config.to_dict(), sort_keys=True) for run in planned}) == len(planned)


@pytest.mark.parametrize(
    "overrides, said",
    [({"release.rul": "none"}, "release.rul"), ({"release.rule": "non"}, "did you mean none")],
)
def test_a_wrong_arm_is_refused_before_anything_runs(models, tmp_path, overrides, said):
    path = tmp_path / "wrong.py"
    both = {"good": {}, "bad": overrides}
    path.write_text(f"SEEDS = (0,)\n\n\ndef arms(config):\n    return {both!r}\n")
    with pytest.raises(UserError, match=said):
        arms.plan(str(path), tiny.config(models), tmp_path)


def test_an_unknown_arm_and_a_file_without_arms_are_refused(models, tmp_path):
    with pytest.raises(UserError, match="did you mean full"):
        arms.plan(str(ROOT / "configs/ablations/rule.py"), tiny.config(models), tmp_path, ["ful"])
    with pytest.raises(UserError, match="is no ablation"):
        arms.plan(str(ROOT / "configs/demo.py"), tiny.config(models), tmp_path)


def test_a_grid_is_every_combination_with_a_name_that_says_it():
    found = arms.grid({"a.b": (1, 2), "c": ("x",)}, {"d": 0})
    assert found == {"b=1+c=x": {"a.b": 1, "c": "x", "d": 0}, "b=2+c=x": {"a.b": 2, "c": "x", "d": 0}}


def test_intervals_and_differences_are_written_with_their_signs():
    row = {"arm": "a", "KL": 0.5, "KL low": 0.4, "KL high": 0.6, "KL difference": -0.1}
    row |= {"KL difference low": -0.2, "KL difference high": 0.01, "KL difference p": 0.06}
    text = sweep_table.markdown([row])
    assert "0.5000 [0.4000, 0.6000]" in text
    assert "-0.1000 [-0.2000, +0.0100], p = 0.06" in text


def test_the_plot_of_arms_names_each_and_its_axis():
    svg = report_figures.intervals("KL, nats/token", ["full", "release"], [(1, 0.5, 2), (2, 2, 2)], [0, 1])
    assert all(word in svg for word in ("full", "release", "KL, nats/token, 95% interval"))
