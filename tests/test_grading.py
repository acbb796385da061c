"""Grading: verdicts known beforehand, hostile text within its limit, and workers that are replaced."""

import collections
import json
import time
from pathlib import Path

import pytest

from opd_jax import answers
from opd_jax.grading import Grader, Task

GOLDEN = Path(__file__).with_name("golden") / "grading.jsonl"
HOSTILE_SECONDS = 1.0


def text(response) -> str:
    """A response: a string, or [part, repetitions] pairs where it is long."""
    return response if isinstance(response, str) else "".join(part * count for part, count in response)


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in GOLDEN.read_text().splitlines()]


@pytest.fixture(scope="module")
def grader():
    with Grader(2, seconds=20) as grader:
        yield grader


def test_at_least_99_per_cent_of_known_verdicts_are_met(rows, grader):
    plain = [row for row in rows if row["kind"] != "hostile"]
    assert len(plain) >= 200
    assert min(collections.Counter(row["kind"] for row in plain).values()) >= 15
    verdicts = grader.grade([Task(text(row["response"]), row["answer"]) for row in plain])
    assert not any(verdict.failed for verdict in verdicts)
    wrong = [row for row, verdict in zip(plain, verdicts) if verdict.right != row["right"]]
    assert len(wrong) <= 0.01 * len(plain), wrong
    for right in (True, False):  # a grader that always says one thing fails here
        assert sum(row["right"] == right for row in plain) > 100


def test_hostile_answers_are_not_right_and_none_takes_more_than_its_limit(rows):
    hostile = [row for row in rows if row["kind"] == "hostile"]
    assert len(hostile) >= 20
    with Grader(2, seconds=HOSTILE_SECONDS) as grader:
        grader.grade([Task("1", "1")] * 2)  # both workers are up
        started = time.perf_counter()
        verdicts = grader.grade([Task(text(row["response"]), row["answer"]) for row in hostile])
        seconds = time.perf_counter() - started
        assert not any(verdict.right for verdict in verdicts)
        ended = sum(bool(verdict.failed) for verdict in verdicts)
        assert 3 < ended < len(hostile), "the limit was never needed, or always"
        assert seconds < len(hostile) * HOSTILE_SECONDS + ended * 6, "6 seconds to replace a worker"
        again = grader.grade([Task("\\boxed{\\frac{2}{4}}", "0.5"), Task("\\boxed{3}", "0.5")])
        assert [verdict.right for verdict in again] == [True, False]


def test_one_slow_answer_delays_no_other(grader):
    slow = Task("\\boxed{9^{9^{9^{9}}}}", "7")
    with Grader(2, seconds=2) as grader:
        verdicts = grader.grade([slow] + [Task(f"\\boxed{{{n}}}", str(n)) for n in range(300)])
    assert (verdicts[0].right, verdicts[0].failed) == (False, "time")
    assert all(verdict.right for verdict in verdicts[1:])


def test_a_worker_that_dies_between_two_tasks_is_replaced():
    with Grader(1) as grader:
        assert grader.grade([Task("1", "1")])[0].right
        process = grader._workers[0]._process
        process.kill()
        process.wait()
        assert grader.grade([Task("1", "1")])[0].failed == "crash"
        assert grader.grade([Task("1", "1")])[0].right


def test_closing_ends_the_processes():
    grader = Grader(1)
    grader.grade([Task("1", "1")])
    process = grader._workers[0]._process
    grader.close()
    assert process.poll() is not None


def test_reasoning_gym_decides_where_many_answers_are_right(grader):
    gym = pytest.importorskip("reasoning_gym")
    items = gym.create_dataset("countdown", size=4, seed=5)
    problem = ("countdown", 4, 5)
    right = [Task(f"<answer>{item['answer']}</answer>", "", (*problem, i)) for i, item in enumerate(items)]
    # The same expression with its terms in brackets is another string and the same answer.
    other = Task(f"<answer>({items[0]['answer']})</answer>", "", (*problem, 0))
    wrong = Task("<answer>1</answer>", "", (*problem, 0))
    verdicts = grader.grade([*right, other, wrong])
    assert [verdict.right for verdict in verdicts] == [True] * 5 + [False]


def test_marked_answers_are_found_in_time_linear_in_the_text():
    for part in ("\\boxed{", "<answer>", "{", "answer is ", "#### ", "\\boxed{1}"):
        started = time.perf_counter()
        answers.final_answers(part * 20_000)
        assert time.perf_counter() - started < 2, part
