"""The demo: what it does in its time, what it says, and what it refuses."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from absl import flags

from opd_jax.demo import plan as demo_plan
from opd_jax.demo import story as demo
from opd_jax.errors import UserError
from opd_jax.progress.progress import Progress
from tests import tiny

MEASURED = demo_plan.Measured(sample=2.0, compare=1.0, compiling=8.0, batch=8, prompt_tokens=64, tokens=96)


def plan(**more):
    of = {"steps": 12, "most": 24, "look": (8, 384), "seconds": {"both arms": 200.0}, "more_seconds": 90.0}
    return demo_plan.Plan(**of | more)


def test_the_announcement_names_the_steps_the_time_and_all_that_is_left_out():
    lowered = {"data.heldout": (24, 16), "rollout.batch": (8, 4)}
    said = demo.announcement(plan(), MEASURED, lowered, spent=40.0)
    assert "12 steps an arm, about 5 s each" in said
    assert "then 8 long answers of up to 384 tokens: 4 minutes in all" in said
    assert "12 of 24 steps an arm (6 minutes at these sizes)" in said
    assert "data.heldout is 16 in place of 24; rollout.batch is 4 in place of 8" in said


def test_nothing_is_left_out_where_all_fits():
    assert "Left out" not in demo.announcement(plan(steps=24, more_seconds=0.0), MEASURED, {}, spent=40.0)


def test_an_accelerator_is_measured_by_its_work_and_named_by_its_kind():
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    job = types.SimpleNamespace(mesh=types.SimpleNamespace(devices=np.array([device] * 4)))
    assert demo.fitting_sizes(job, None, left=60.0) == (demo_plan.WHOLE, "4 x TPU v5 lite")


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """(folder, what was printed, records of the arms, long answers) of a tiny demo without a limit."""
    out = tmp_path_factory.mktemp("demo")
    config = tiny.config(models, **{"train.steps": 2, "data.heldout": 8, "eval.every": 2})
    said = []
    with Progress(active=False) as progress:
        progress.say = lambda text, file=None: said.append(text)
        runs, records = demo.run_arms(config, out, demo_plan.Budget(0), progress)
    return out, "\n".join(said), runs, records


def test_both_arms_start_alike_and_the_rule_alone_differs(done):
    _, said, runs, _ = done
    assert {run.rule for run in runs.values()} == {"none", "paper"}
    full, release = (run.evals for run in runs.values())
    assert full[0] == release[0] and [line["step"] for line in full] == [0, 2]
    assert full[0]["teacher_finished_share"] is not None
    assert "2 steps an arm" in said and "Left out" not in said
    assert "teacher" in demo.table(runs).splitlines()[0]


def test_the_trained_student_is_asked_for_long_answers(done):
    out, _, _, records = done
    assert [json.loads(line) for line in (out / demo.LONG_FILE).read_text().splitlines()] == records
    assert len(records) == demo_plan.LOOKS[0][0]
    assert all("full sentences" in record["prompt"] for record in records)


def test_the_same_folder_again_goes_on_with_the_sizes_it_began_with(done, models):
    out, _, runs, _ = done
    larger = tiny.config(models, **{"train.steps": 7, "data.heldout": 6, "eval.every": 2})
    with Progress(active=False) as progress:
        again, _ = demo.run_arms(larger, out, demo_plan.Budget(0), progress)
    assert (larger.train.steps, larger.data.heldout) == (2, 8)
    assert [run.train for run in again.values()] == [run.train for run in runs.values()]


@pytest.mark.parametrize(
    "changes, minutes, message",
    [({}, -1.0, "--minutes"), ({"eval.every": 0}, 8.0, "eval.every"), ({"data.heldout": 0}, 8.0, "heldout")],
)
def test_what_it_cannot_do_is_said_before_anything_is_read(models, monkeypatch, changes, minutes, message):
    config = tiny.config(models, **changes)
    options = types.SimpleNamespace(minutes=minutes, out=None, config=config)
    monkeypatch.setattr(flags, "FLAGS", options)
    with pytest.raises(UserError, match=message):
        demo.main([])


def test_one_batch_is_measured_when_everything_is_compiled(models):
    job = demo.prepare(tiny.config(models, **{"data.heldout": 8}))
    evaluation, measured = demo.measure(job, job.start().params, job.teacher_params())
    rest = evaluation["seconds"] - measured.sample - measured.compare
    assert measured.compiling == pytest.approx(max(rest, 0.0), abs=1e-6)
    assert dataclasses.replace(measured, batch=1).evaluation(3) == 3 * (measured.sample + measured.compare)


def test_training_the_arms_donates_the_start_to_the_last(models, tmp_path):
    config = tiny.config(models, **{"train.steps": 1, "eval.every": 0, "checkpoint.every": 0})
    jobs = demo.prepare_arms(config, tmp_path)
    start = jobs["full"].start()
    before = jax.device_get(start.params)
    state = demo.train_arms(jobs, tmp_path, {"rows": []}, start, jobs["full"].teacher_params())
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(start.params)) and int(state.step) == 1
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    assert any(jax.tree.leaves(changed))
