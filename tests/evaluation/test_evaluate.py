"""Held-out evaluation: the distance to the teacher, its interval, and the entry point."""

import json
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.errors import UserError
from opd_jax.evaluate import main
from opd_jax.evaluation.estimates import bootstrap_ratio
from opd_jax.evaluation.heldout import evaluate, evaluate_teacher
from opd_jax.run import metrics
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.draw import Draw
from opd_jax.run.job import prepare
from opd_jax.run.restore import restore_params, run_config
from tests import tiny

NONE_HELD_OUT = {"data.heldout": 0, "eval.every": 0}


@pytest.fixture(scope="module")
def job(models):
    """A pair whose teacher is a folder of the student's shape, so that either can stand for it."""
    return prepare(tiny.config(models, **{"teacher.path": str(models / "student"), "data.heldout": 11}))


@pytest.fixture(scope="module")
def equal(job):
    return evaluate(job, job.start().params, job.teacher_params())


def test_a_student_equal_to_its_teacher_is_at_no_distance(equal):
    assert 0 <= equal["kl"] < 1e-6
    assert equal["kl_high"] < 1e-6
    assert -10 < equal["teacher_logp"] < -1


def test_every_held_out_prompt_is_answered_once(equal, job):
    assert equal["prompts"] == len(equal["rows"]) == 11
    assert [row["prompt"] for row in equal["rows"]] == list(range(11))
    assert [row["text"] for row in equal["rows"]] == [p.text for p in job.prompts.heldout]
    assert equal["tokens"] == sum(row["tokens"] for row in equal["rows"])
    assert equal["response_length"] == equal["tokens"] / 11
    assert equal["finished_share"] == np.mean([row["finished"] for row in equal["rows"]])


def test_an_evaluation_pays_for_its_prompts_not_for_a_training_batch(models, equal, job):
    teacher = str(models / "student")
    sizes = {"data.heldout": 11, "rollout.batch": 32, "train.micro_batch": 4}
    large = prepare(tiny.config(models, **{"teacher.path": teacher, **sizes}))
    batching = large.batching.fitting(large.mesh, 11)
    assert batching.batch == len(batching.own_rows()) == 16
    assert large.batching.fitting(large.mesh, 17).batch == 32  # two programs would be no cheaper
    params = large.start().params
    with unittest.mock.patch.object(Draw, "__call__", autospec=True, side_effect=Draw.__call__) as drawn:
        theirs = evaluate(large, params, large.teacher_params())
    assert [call.args[2].tokens_BP.shape[0] for call in drawn.call_args_list] == [16]
    assert [row["text"] for row in theirs["rows"]] == [row["text"] for row in equal["rows"]]
    # Row b of a batch draws from (key, batch, b): the first eight rows of both are the same draws.
    assert [row["response"] for row in theirs["rows"]][:8] == [row["response"] for row in equal["rows"]][:8]


def test_the_teacher_in_the_students_place_answers_as_an_equal_student(job, equal):
    theirs = evaluate_teacher(job, job.teacher_params())
    assert theirs.pop("seconds") > 0
    assert theirs == {name: equal[name] for name in theirs}
    assert theirs.keys() == {"response_length", "finished_share", "repeated_share", "prompts", "tokens"}


def test_an_evaluation_counts_the_responses_that_loop(models, equal):
    """A model of zeros, asked greedily, writes one token for ever."""
    assert equal["repeated_share"] == 0
    overrides = {"rollout.max_tokens": 40, "rollout.temperature": 0.0, "data.heldout": 3}
    job = prepare(tiny.config(models, **overrides))
    zeros = jax.tree.map(jnp.zeros_like, job.start().params)
    found = evaluate(job, zeros, job.teacher_params())
    assert (found["repeated_share"], found["finished_share"]) == (1, 0)


def test_evaluations_differ_by_the_student_alone(job, equal):
    params = job.start().params
    other = evaluate(job, params | {"final_norm": 0.9 * params["final_norm"]}, job.teacher_params())
    again = evaluate(job, params, job.teacher_params())
    assert other["kl"] > 1e-4
    assert other["kl_low"] < other["kl"] < other["kl_high"]
    per_token = sum(row["kl"] * row["tokens"] for row in other["rows"]) / other["tokens"]
    assert other["kl"] == pytest.approx(per_token, rel=1e-6)
    assert [row["response"] for row in again["rows"]] == [row["response"] for row in equal["rows"]]


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(3)
    count_B = rng.integers(5, 200, 60)
    total_B = count_B * rng.gamma(4, 0.1, 60)
    ours = bootstrap_ratio(total_B, count_B)
    theirs = stats.bootstrap(
        (total_B, count_B),
        lambda t, c, axis: t.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose(ours, theirs, atol=0.08 * width)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        count_B = rng.integers(5, 50, 60)
        total_B = count_B * rng.normal(0.7, 0.2, 60)
        low, high = bootstrap_ratio(total_B, count_B)
        covered += low <= 0.7 <= high
    # 95% of 200 is 190; the percentile interval is a little narrow at 60 prompts.
    assert 176 <= covered <= 199


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A workdir as a run leaves it, with one checkpoint: the student's start, after 3 steps."""
    workdir = tmp_path_factory.mktemp("run")
    job = prepare(tiny.config(models))
    metrics.write_run_files(workdir, job.config)
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(3, job.start(), {"step": 3}, None)
    return workdir


def test_the_entry_evaluates_the_newest_checkpoint_of_a_run(run, models):
    done = tiny.entry("opd_jax.evaluate", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines())
    assert float(said["kl"]) > 0.01
    assert said["prompts"] == "6"
    rows = [json.loads(line) for line in (run / "evaluation_3.jsonl").read_text().splitlines()]
    assert len(rows) == 6


def test_an_evaluation_reads_the_parameters_alone(run, models, monkeypatch):
    """With the moments a student of float32 parameters would need three times the memory."""
    job = prepare(tiny.config(models))
    monkeypatch.setattr(Checkpoints, "restore", None)
    before = {id(array) for array in jax.live_arrays()}
    params, step = restore_params(job, run, "latest")
    new = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    assert new == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, tiny.student_params())


def test_a_mistake_ends_the_process_in_one_line():
    done = tiny.entry("opd_jax.evaluate")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "--workdir=DIR" in done.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        ({"workdir": "/nowhere"}, "--workdir=/nowhere holds no run"),
        ({"workdir": "{run}", "step": "4"}, "no checkpoint of step 4; there: 3"),
        ({"workdir": "{run}", "step": "best"}, "--step=best"),
        ({"config": NONE_HELD_OUT}, "data.heldout=0"),
        ({"model": "/nowhere"}, "--model needs --benchmark"),
    ],
)
def test_a_run_model_or_checkpoint_that_is_not_there_is_a_mistake(run, models, monkeypatch, given, said):
    given = {key: value.format(run=run) if isinstance(value, str) else value for key, value in given.items()}
    if "config" in given:
        given["config"] = tiny.config(models, **given["config"])
    options = {"workdir": None, "config": None, "benchmark": [], "model": None, "step": "latest"} | given
    monkeypatch.setattr("opd_jax.evaluate.flags.FLAGS", types.SimpleNamespace(**options))
    with pytest.raises(UserError, match=said) as caught:
        main([])
    assert "\n" not in str(caught.value)


def test_a_run_older_than_a_field_is_read_with_the_fields_default(models, tmp_path):
    settings = tiny.config(models, **{"data.prompt_buckets": (16,), "rollout.top_k": 7}).to_dict()
    del settings["rollout"]["min_p"], settings["data"]["columns"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = run_config(tmp_path)
    assert (config.rollout.min_p, config.rollout.top_k, config.data.prompt_buckets) == (0.0, 7, (16,))
    assert config.data.columns.prompt == ""
