"""Grading: what counts as right, and rewards that reach the mesh in the order of the prompts."""

import json

import jax
import numpy as np
import pytest

from opd_jax.evaluation import answers, rewards
from opd_jax.evaluation.grading import Grader
from opd_jax.parallel import sharding
from opd_jax.run.job import prepare
from tests import tiny

RIGHT = [
    ("10", r"The total is \$10."),
    ("10", "First 7, so we get $10"),
    ("1200", "it is 1,200"),
    ("12.50", "$12.5"),
    ("0.5", r"\boxed{\frac{1}{2}}"),
    ("1/2", r"\boxed{0.5}"),
    (r"$\frac{1}{2}$", "The answer is $1/2$."),
    ("50", r"\boxed{50\%}"),
    ("12", r"so it is \boxed{\text{12 apples}}, not 7"),
    ("72", "Answer: 72 apples"),
    ("3", "I think x=3."),
    ("12", "At 3/4 of the price it is 12"),
    ("5", "3-5=-2\nThe answer is 5\nGood luck, all 9 of you!"),
    ("7", "2 + 5 = 7\n#### 7"),
    ("4", "<answer> 4 </answer> since 2 + 2 = 4 and 3 is less"),
    ("-3", "It is -3."),
    ("yes", "The answer is Yes."),
    ("B", "The answer is B"),
    ("x^2+1", r"\boxed{1+x^2}"),
    ("Paris", "Let me see.\nParis."),
    ("9*2=<<9*2=18>>18\n#### 1,018", "The answer is 1018."),
    (r"So it is \boxed{\frac{1}{2}}.", "#### 0.5"),
]
WRONG = [
    ("9*2=<<9*2=18>>18\n#### 1,018", "18"),
    ("7", ""),
    ("7", "no idea"),
    ("7", r"\boxed{6} or 7"),
    ("7", r"\boxed{}"),
    ("18", "Step 18, then 19"),
    ("-5", "It is 3-5"),
    ("3", r"\boxed{2x+3}"),
    ("2", "I came 2nd"),
    ("yes", "The answer is no."),
    ("x^2+1", r"\boxed{x^2-1}"),
    ("100", "100.01"),
]


@pytest.mark.parametrize("answer, response", RIGHT)
def test_a_right_final_answer_is_right(answer, response):
    assert answers.grade(response, answer) is True


@pytest.mark.parametrize("answer, response", WRONG)
def test_a_wrong_final_answer_is_wrong(answer, response):
    assert answers.grade(response, answer) is False


def test_worked_answers_of_reasoning_gym_are_right_and_those_of_other_problems_wrong():
    gym = pytest.importorskip("reasoning_gym")
    items = list(gym.create_dataset("gsm_symbolic", size=40, seed=3))
    worked = [item["metadata"]["answer_cot"] for item in items]
    graded = [answers.grade(text, item["answer"]) for text, item in zip(worked, items)]
    assert graded == [True] * len(items)
    others = worked[1:] + worked[:1]
    wrong = [i for i, (a, b) in enumerate(zip(items, items[1:] + items[:1])) if a["answer"] != b["answer"]]
    assert len(wrong) > 20
    assert not any(answers.grade(others[i], items[i]["answer"]) for i in wrong)


def test_rewards_stand_in_the_order_of_the_prompts_and_are_nan_without_an_answer():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    responses = ["It is 1.", "It is 2.", "It is 3.", "It is 4.", "", "6", "7", "9"]
    rollouts = tiny.written(responses, tiny.STUDENT, tiny.student_params(), width=16)
    wanted = ["1", "2", "0", None, "5", "6", None, "8"]
    placed = sharding.put_batch(mesh, rollouts)
    with Grader(1) as grader:
        reward_B = rewards.reward_batch(mesh, tiny.tokenizer(), grader, wanted, placed)
    assert reward_B.sharding == sharding.batch(mesh)
    np.testing.assert_array_equal(jax.device_get(reward_B), [1, 1, 0, np.nan, 0, 1, np.nan, 0])


def test_responses_to_one_prompt_are_graded_by_its_answer(models, tmp_path):
    lines = [json.dumps({"prompt": f"Say {n}.", "answer": str(n)}) for n in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"data.path": str(tmp_path / "prompts.jsonl"), "data.heldout": 1, "reward.weight": 1.0}
    groups = {"rollout.samples_per_prompt": 2, "train.micro_batch": 4, "mesh.data": 2, "mesh.tensor": 2}
    job = prepare(tiny.config(models, **settings, **groups))
    index_Q = np.array([5, 0, 3, 6])
    said = [job.prompts.train[index].answer for index in index_Q]
    responses = [text for answer in said for text in (f"It is {answer}.", "It is 77.")]
    rollouts = tiny.written(responses, tiny.STUDENT, tiny.student_params(), width=12)
    reward_B = job.reward(index_Q, sharding.put_batch(job.mesh, rollouts))
    np.testing.assert_array_equal(jax.device_get(reward_B), [1, 0] * 4)


@pytest.mark.parametrize("ending", ["<think>\n", "<reasoning>", ""])
def test_a_thought_that_the_prompt_begins_and_the_response_does_not_end_has_no_answer(ending):
    tokenizer = tiny.tokenizer()
    prompt = list(f"2+2? {ending}".encode())
    tokens_BL = np.array([prompt + list(text.encode()) for text in ("so it is 4", "4</think>4")])
    mask_BT = np.ones((2, 10), bool)
    with Grader(1) as grader:
        right = rewards.graded(tokenizer, grader, ["4", "4"], tokens_BL, mask_BT)
    assert right == [not ending, True]
