"""The sorting study's task: right responses, first errors, problems, tokenizer."""

import json

import pytest

from opd_jax.models import source
from opd_jax.study import sorting


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
        assert sorting.final_answer(text) == order
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


def test_every_number_is_one_token_and_both_models_share_the_tokenizer(tmp_path):
    sorting.write_models(tmp_path)
    tokenizer = sorting.make_tokenizer()
    for number in range(10, 100):
        assert len(tokenizer.encode(f" {number}")) == 1
    texts = [(tmp_path / "shapes" / name / "tokenizer.json").read_text() for name in sorting.SIZES]
    assert texts[0] == texts[1]
    folders = {name: f"random:{tmp_path / 'shapes' / name}" for name in sorting.SIZES}
    sizes = {name: source.config(folder).parameter_count() for name, folder in folders.items()}
    assert 2 * sizes["student"] < sizes["teacher"] < 3_000_000  # 12 MB in float32


def test_problems_to_learn_from_and_to_distil_on_differ(tmp_path):
    sorting.write_problems(tmp_path)
    worked = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "worked.jsonl").open()]
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").open()]
    assert len(prompts) > 3500
    assert not set(worked) & set(prompts)
