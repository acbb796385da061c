"""Grading: verdicts known beforehand, hostile text within its limit, and workers that are replaced."""

import collections
import json
import os
import signal
import time
from pathlib import Path

import pytest

from opd_jax.evaluation import answers
from opd_jax.evaluation.grading import Grader, Task

GOLDEN = Path(__file__).parents[1] / "golden"
LATER = ("_unseen", "_fresh", "_third", "_fourth", "_fifth", "_sixth")
SETS = tuple(f"grading{name}.jsonl" for name in ("", *LATER))
HOSTILE_SECONDS = 1.0


def text(response) -> str:
    """A response: a string, or [part, repetitions] pairs where it is long."""
    return response if isinstance(response, str) else "".join(part * count for part, count in response)


def read(name) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def grader():
    with Grader(2, seconds=20) as grader:
        yield grader


@pytest.mark.parametrize("name", SETS)
def test_at_least_99_per_cent_of_known_verdicts_are_met(name, grader):
    plain = [row for row in read(name) if row["kind"] != "hostile"]
    assert len(plain) >= 144
    verdicts = grader.grade([Task(text(row["response"]), row["answer"]) for row in plain])
    assert not any(verdict.failed for verdict in verdicts)
    wrong = [row for row, verdict in zip(plain, verdicts) if verdict.right != row["right"]]
    assert len(wrong) <= 0.01 * len(plain), wrong
    for right in (True, False):  # a grader that always says one thing fails here
        assert sum(row["right"] == right for row in plain) > 40


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is 36, altogether, so the shop keeps that many.", "36", True),
        ("So the answer is 9 pears and nobody eats one.", "9", True),
        ("The answer is $1,200, which is the total.", "1200", True),
        ("The answer is 12, or a dozen.", "12", True),
        ("The answer is approximately 3.14.", "3.14", True),
        ("The answer is 3 or 4.", "3", False),
        ("The answer is 9 and 10.", "9", False),
        ("The answer is 7, 8 and 9.", "7", False),
        ("<think>maybe \\boxed{41}</think>\nThe answer is 42.", "41", False),
        ("<think>The answer is 41? Hmm.</think>\n\n**42**", "42", True),
        ("Okay, try \\boxed{41}. No.\n</think>\n\nThe result is $42$.", "42", True),
        ("<think>a <answer>41</answer> b</think> So it is 42.", "42", True),
        ("<think>It is \\boxed{42}", "42", False),
        ("\\boxed{2^{-98}}", "2^{-99}", False),
        ("\\boxed{\\frac{1}{2^{99}}}", "2^{-99}", True),
        ("\\boxed{e^{-45}}", "e^{-44}", False),
        ("\\boxed{\\frac{1}{52!}}", "\\frac{1}{51!}", False),
        ("\\boxed{0.333333}", "1/3", True),
        ("\\boxed{1, 3, 5, \\ldots, 2n-1}", "1, 2, \\ldots, n", False),
        ("\\boxed{1, 2, \\ldots, 100}", "100", False),
        ("\\boxed{1,2,\\dots,100}", "1, 2, ..., 100", True),
    ],
)
def test_thoughts_asides_tiny_numbers_and_ellipses_are_read_as_a_person_reads_them(response, answer, right):
    assert answers.grade(response, answer) == right


def test_no_wrong_hostile_answer_is_right_and_none_takes_more_than_its_limit():
    hostile = [row for name in SETS for row in read(name) if row["kind"] == "hostile"]
    assert len(hostile) >= 65
    with Grader(2, seconds=HOSTILE_SECONDS) as grader:
        grader.grade([Task("1", "1")] * 2)  # both workers are up
        started = time.perf_counter()
        verdicts = grader.grade([Task(text(row["response"]), row["answer"]) for row in hostile])
        seconds = time.perf_counter() - started
        assert not any(verdict.right and not row["right"] for row, verdict in zip(hostile, verdicts))
        failed = collections.Counter(verdict.failed for verdict in verdicts)
        assert 3 < failed["time"] < len(hostile), "the limit was never needed, or always"
        assert set(failed) <= {"", "time", "crash", "error"}
        assert seconds < len(hostile) * (HOSTILE_SECONDS + 0.5)
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
        os.killpg(process.pid, signal.SIGKILL)
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


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("500 cm", "5 m", True),
        ("5 cm", "5 m", False),
        ("2 square feet", "288 in^2", True),
        ("60 mph", "60 miles per hour", True),
        ("60 mph", "60 km/h", False),
        ("90 minutes", "1.5 hours", True),
        ("3 ms", "3 s", False),
        ("180 degrees", "180 rad", False),
        ("12 cm", "12 cm^2", True),  # the dimension is the problem's
        ("12 apples", "12 pears", True),
    ],
)
def test_units_of_one_dimension_are_converted_and_others_do_not_count(said, answer, right):
    assert answers.same(said, answer) == right


@pytest.mark.parametrize(
    "response, right",
    [
        ("B. Both plates are charged.", True),
        ("A. 5\nB. 7\nC. 9", False),  # lists the options, chooses none
        ("A) 5\nB) 7", False),
        ("A) 5\nB) 7\nB", True),
    ],
)
def test_options_that_are_listed_are_not_chosen(response, right):
    assert answers.grade(response, "B") == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The smallest of 9 12 is 9. So the order is 3 7.5 9 12.", True),
        ("So the order is 3 7.5 12 9.", False),
        ("So the order is 1 3 7.5 9 12.", False),
        ("3 7.5 9 12\nThat took 4 steps.", False),
        ("", False),
    ],
)
def test_an_unmarked_list_is_the_numbers_of_the_last_sentence(response, right):
    assert answers.grade(response, "3 7.5 9 12") is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The chance is 1/8.", "0.125", True),
        ("The chance is 1/8.", "8", False),
        ("The chance is $\\frac{1}{8}$.", "8", False),
        ("So there are $2^{10}$ of them.", "10", False),
        ("So we have $12{,}500$ of them.", "500", False),
        ("It takes 3 1/2 hours", "3.5", True),
        ("So N = 6.02 x 10^23", "6.02e23", True),
        ("Hence the length is $12\\pi$.", "12\\pi", True),
        ("Hence the length is $12\\pi$.", "6\\pi", False),
    ],
)
def test_an_unmarked_number_is_all_of_it_and_not_its_parts(response, answer, right):
    assert answers.grade(response, answer) is right


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("1234567", "1234568", False),
        ("1.234568e6", "1234568", True),
        ("3 \\times 10^8", "300000001", False),
        ("\\frac{1048575}{1048576}", "\\frac{1048574}{1048576}", False),
        ("0.333333", "\\frac{1}{3}", True),
        ("5 p.m.", "5 AM", False),
        ("3sqrt(2)", "\\sqrt{18}", True),
        ("forty-two", "42", True),
    ],
)
def test_integers_and_fractions_compare_exactly_and_typed_forms_are_read(said, answer, right):
    assert answers.same(said, answer) is right


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("0.045455", "1/22", True),
        ("0.045454", "1/22", False),  # cut off, not rounded
        ("0.0455", "1/22", False),  # three significant digits
        ("-0.04545", "1/22", False),
        ("0.3333", "\\frac{1}{3}", True),
        ("0.3334", "\\frac{1}{3}", False),
        ("0.333", "\\frac{1}{3}", False),
        ("4.667", "14/3", True),
        ("4.6667", "4\\frac{2}{3}", True),
        ("3.142", "22/7", False),
        ("3.1416", "\\pi", False),
        ("0.1235", "\\frac{12345}{100000}", False),  # it could have been written out
        ("0.0009766", "\\frac{1}{1024}", False),
        ("1.5777e-30", "2^{-98}", False),
        ("3333.3 m", "10000/3 m", True),
        ("0.3333 km", "1/3 m", False),
        ("0.3333%", "1/3", False),
    ],
)
def test_a_decimal_of_four_digits_equals_the_fraction_that_it_rounds(said, answer, right):
    assert answers.same(said, answer) is right
    assert answers.grade(f"So it is \\boxed{{{said}}}.", answer) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("So the chance is 0.045455.", "1/22", True),
        ("So the chance is 1/22.", "0.045455", False),  # as a number alone it is no fraction
        ("So the chance is \\boxed{1/22}.", "0.045455", True),
        ("So the chance is 0.0455.", "1/22", False),
    ],
)
def test_rounded_fractions_count_without_a_box_too(response, answer, right):
    assert answers.grade(response, answer) is right


def test_marked_answers_are_found_in_time_linear_in_the_text():
    for part in ("\\boxed{", "<answer>", "{", "answer is ", "#### ", "\\boxed{1}"):
        started = time.perf_counter()
        answers.final_answers(part * 20_000)
        assert time.perf_counter() - started < 2, part


def test_unmarked_answers_are_found_in_time_linear_in_the_text():
    for part in ("1", "1 ", "1/", "9.", "10^", "\\text{", "\\frac{", "sqrt(", "1st ", "it is ", " "):
        started = time.perf_counter()
        for answer in ("7", "\\frac{1}{3}", "B"):
            answers.grade(part * 20_000, answer)
        assert time.perf_counter() - started < 2, part
