"""Which records raise an alarm, and what becomes of it in the run's files and among its progress."""

import io
import json

import pytest

from opd_jax.run import alarms, run_record
from opd_jax.run.alarms import WINDOW, Alarms
from tests import tiny

SOUND = {
    "stop_probability": 0.01,
    "teacher_stop_probability": 0.012,
    "response_tokens": 500,
    "finished_share": 0.6,
    "repeated_share": 0.0,
}


def train(step, **changes):
    return {"kind": "train", "step": step} | SOUND | changes


def evaluation(step, finished_share, repeated_share=0.0):
    return {"kind": "eval", "step": step, "finished_share": finished_share, "repeated_share": repeated_share}


def raised(records):
    """(alarm, step) of what the records raise, in order."""
    watch = Alarms()
    return [(alarm["alarm"], alarm["step"]) for record in records for alarm in watch.read(record)]


def test_a_sound_run_raises_nothing():
    assert raised([evaluation(0, 0.6), *map(train, range(1, 50)), evaluation(50, 0.5)]) == []


def test_a_stop_probability_far_below_the_teachers_over_a_window_is_an_alarm_once():
    fallen = [train(step, stop_probability=0.0001) for step in range(1, 3 * WINDOW)]
    assert raised(fallen) == [("stop_probability", WINDOW)]
    assert raised(fallen[: WINDOW - 1]) == []


def test_one_step_without_ends_is_no_alarm():
    assert raised([train(step, stop_probability=0.01 * (step != 20)) for step in range(1, 40)]) == []


def test_a_student_that_does_not_stop_where_the_teacher_would_not_either_is_no_alarm():
    quiet = {"stop_probability": 1e-6, "teacher_stop_probability": 1e-4}
    assert raised([train(step, **quiet) for step in range(1, 20)]) == []  # 0.4 ends expected in a window
    assert raised([train(step, **quiet, response_tokens=5000) for step in range(1, 20)]) != []


LOST = {"stop_probability": 0.004}  # a third of the teacher's


def test_a_finished_share_below_half_of_the_starts_is_an_alarm_where_the_student_lost_its_ends():
    shares = {0: 0.62, 8: 0.32, 16: 0.3, 24: 0.1}
    records = [r for step, share in shares.items() for r in (train(step, **LOST), evaluation(step, share))]
    assert raised(records) == [("finished_share", 16)]
    assert raised([evaluation(0, 0.2), evaluation(8, 0.06)]) == []  # too little to fall far


def test_a_start_that_ended_too_early_may_end_less_often():
    assert raised([evaluation(0, 0.62), train(1), evaluation(1, 0.2)]) == []


def test_the_teachers_own_finished_share_is_the_goal_where_it_is_known():
    start = evaluation(0, 0.62) | {"teacher_finished_share": 0.3}
    assert raised([start, train(1), evaluation(1, 0.16)]) == []
    watch = Alarms()
    (alarm,) = [a for r in (start, train(1), evaluation(1, 0.04)) for a in watch.read(r)]
    assert (alarm["value"], alarm["goal"], alarm["reference"]) == (0.04, 0.3, "the teacher")


def test_a_finished_share_that_sinks_in_training_is_an_alarm_without_evaluations():
    sinking = [train(step, finished_share=0.6 if step <= WINDOW else 0.1, **LOST) for step in range(1, 40)]
    (alarm,) = raised(sinking)
    assert alarm[0] == "finished_share" and WINDOW < alarm[1] <= 2 * WINDOW


def test_rollouts_that_were_stopped_are_not_missing_ends():
    """A tenth of the rest still ends too seldom; where nothing is written to its end, nothing is known."""
    half = [train(step, finished_share=0.6 if step <= WINDOW else 0.3, **LOST) for step in range(1, 40)]
    stopping = [line | {"stopped_share": 0.0 if line["step"] <= WINDOW else 0.5} for line in half]
    assert raised(stopping) == []
    fewer = [line | {"finished_share": 0.05} if line["step"] > WINDOW else line for line in stopping]
    assert [name for name, _ in raised(fewer)] == ["finished_share"]
    assert raised([train(step, finished_share=0.0, stopped_share=1.0) for step in range(1, 40)]) == []


def test_responses_that_loop_are_an_alarm_at_the_start_too():
    assert raised([evaluation(0, 0.6, repeated_share=0.3)]) == [("repeated_share", 0)]
    looping = [train(step, repeated_share=0.25) for step in range(1, 20)]
    assert raised(looping) == [("repeated_share", WINDOW)]


def test_records_without_the_numbers_raise_nothing():
    bare = [{"kind": kind, "step": step} for step in range(20) for kind in ("train", "eval", "benchmark")]
    assert raised(bare) == []
    assert raised([train(step, finished_share=None, stop_probability=None) for step in range(20)]) == []


@pytest.mark.parametrize("name", alarms.TEXTS)
def test_every_alarm_says_its_numbers_and_where_to_read_on(name):
    line = alarms.text({"alarm": name, "step": 7, "value": 0.04, "goal": 0.6, "reference": "the start"})
    assert line.startswith("step 7: ") and alarms.PAGE in line and "\n" not in line
    assert ("4%" in line) == (name not in ("skipped_updates", "not_finite"))


def test_an_update_that_was_skipped_and_a_kl_that_is_not_finite_raise_an_alarm():
    assert raised([train(1, skipped_updates=0.0)]) == []
    assert raised([train(step, skipped_updates=1.0) for step in (1, 2)]) == [("skipped_updates", 1)]
    assert raised([evaluation(0, 0.5), evaluation(3, 0.5) | {"kl": None}]) == [("not_finite", 3)]


def test_an_alarm_is_written_after_its_record_shown_once_and_not_raised_again_after_a_resume(tmp_path):
    shown = io.StringIO()
    with tiny.writer(tmp_path, stream=shown) as out:
        out.write(evaluation(0, 0.6))
        for step in (1, 2):
            out.write(train(step, **LOST))
            out.write(evaluation(step, 0.1))
    with tiny.writer(tmp_path, stream=shown, resume_step=2) as out:
        out.write(evaluation(3, 0.05))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records if r["kind"] != "train"] == [
        ("eval", 0), ("eval", 1), ("alarm", 1), ("eval", 2), ("eval", 3),
    ]  # fmt: skip
    (alarm,) = run_record.read_run(tmp_path).alarms
    told = {"alarm": "finished_share", "of": "eval", "value": 0.1, "goal": 0.6, "reference": "the start"}
    assert alarm == {"kind": "alarm", "step": 1} | told
    said = [line for line in shown.getvalue().splitlines() if line.startswith("alarm: ")]
    assert said == [f"alarm: {alarms.text(alarm)}"]


def test_an_alarm_dropped_with_its_step_is_raised_again(tmp_path):
    shown = io.StringIO()
    with tiny.writer(tmp_path, stream=shown) as out:
        for record in (evaluation(0, 0.6), train(1, **LOST), evaluation(2, 0.1)):
            out.write(record)
    with tiny.writer(tmp_path, stream=shown, resume_step=1) as out:
        out.write(evaluation(2, 0.1))
    assert shown.getvalue().count("alarm: ") == 2
    assert len(run_record.read_run(tmp_path).alarms) == 1
