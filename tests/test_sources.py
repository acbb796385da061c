"""Prompts of many origins: columns, generators, mixtures, earlier turns, and what evaluation shares."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from configs import default
from opd_jax import data
from opd_jax.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def load(tokenizer, **changes):
    section = default.get_config().data
    section.update({"prompt_tokens": 2048, "heldout": 0, "source": "jsonl"} | changes)
    return data.load(section, tokenizer)


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# The columns of public data sets, as their cards show them.
SCHEMAS = {
    "deepmath": (
        {"question": "Q?", "final_answer": "7", "difficulty": 5, "topic": "Algebra", "r1_solution_1": "..."},
        {"prompt": "question", "answer": "final_answer"},
        "7",
    ),
    "gsm8k": ({"question": "Q?", "answer": "So 3.\n#### 3"}, {}, "So 3.\n#### 3"),
    "dapo": (
        {
            "prompt": [{"role": "user", "content": "Q?"}],
            "reward_model": {"ground_truth": "34", "style": "rule"},
        },
        {"answer": "reward_model.ground_truth"},
        "34",
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_usual_data_sets_are_read_by_their_columns(tokenizer, tmp_path, name, kind):
    record, columns, answer = SCHEMAS[name]
    path = tmp_path / f"{name}.{kind}"
    if kind == "jsonl":
        write(path, [record, record])
    else:
        pa.parquet.write_table(pa.Table.from_pylist([record, record]), path)
    prompts = load(tokenizer, source=kind, path=str(path), columns=columns).train
    assert [(p.text, p.answer) for p in prompts] == [("Q?", answer)] * 2


def test_a_column_that_is_not_there_is_named(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Q?"}])
    with pytest.raises(UserError, match=r"record 1 .*'query'.*data.columns.prompt"):
        load(tokenizer, path=path, columns={"prompt": "query"})


def test_generated_problems_are_the_generators_own_and_depend_on_the_seed(tokenizer):
    gym = pytest.importorskip("reasoning_gym")
    prompts = load(tokenizer, source="rg:chain_sum", generated=12, generated_seed=3, heldout=4)
    items = list(gym.create_dataset("chain_sum", size=12, seed=3))
    assert {(p.text, p.answer) for p in prompts.train + prompts.heldout} == {
        (item["question"], item["answer"]) for item in items
    }
    other = load(tokenizer, source="rg:chain_sum", generated=12, generated_seed=4)
    assert {p.text for p in other.train} != {item["question"] for item in items}


def test_a_mixture_takes_rows_by_weight_whatever_the_sizes(tokenizer, tmp_path):
    few = write(tmp_path / "few.jsonl", [{"q": f"few {i}"} for i in range(5)])
    many = write(tmp_path / "many.jsonl", [{"prompt": f"many {i}"} for i in range(200)])
    mixture = (f"3 jsonl:{few} prompt=q", f"1 jsonl:{many}")
    prompts = load(tokenizer, source="mixture", mixture=mixture, heldout=20)
    assert sum(count for count, _ in prompts.parts) == len(prompts.train) == 185
    assert not {p.text for p in prompts.train} & {p.text for p in prompts.heldout}

    def rows(steps, start=None):
        batches = data.batches(prompts.train, 8, 64, 0, seed=1, start=start, parts=prompts.parts)
        taken = np.concatenate([next(batches).index_B for _ in range(steps)])
        return [prompts.train[i].text for i in taken], batches.state()

    texts, _ = rows(40)
    assert sum(text.startswith("few") for text in texts) == pytest.approx(240, abs=4)
    one_part = [text for text in texts if text.startswith("many")]
    assert len(set(one_part)) == len(one_part), "a prompt came twice within its epoch"
    head, state = rows(15)
    tail, _ = rows(25, json.loads(json.dumps(state)))
    assert head + tail == texts
    with pytest.raises(UserError, match="weights"):
        data.batches(
            prompts.train, 8, 64, 0, seed=1, start=state, parts=[(n, w + 1) for n, w in prompts.parts]
        )


def test_earlier_turns_and_the_instruction_stand_where_they_belong(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+2?"}])
    shots = write(tmp_path / "shots.jsonl", [{"prompt": "1+1?", "response": "2"}])
    prompts = load(tokenizer, path=path, few_shot=shots, instruction="Box it.", system_prompt="S").train
    assert tokenizer.decode(prompts[0].ids) == (
        "<|im_start|>s:S<|im_end|><|im_start|>u:1+1?<|im_end|><|im_start|>a:2<|im_end|>"
        "<|im_start|>u:2+2?\n\nBox it.<|im_end|><|im_start|>a:"
    )
    assert prompts[0].text == "2+2?"
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "1+1?"}])
    with pytest.raises(UserError, match=r"data.few_shot.*record 1"):
        load(tokenizer, path=path, few_shot=bad)


def test_duplicates_are_found_but_for_case_spaces_and_punctuation():
    train = ["What is 2 + 2?", "Other", "what is 2+2", "What is 2 + 3?"]
    assert data.duplicates(train, ["WHAT is  2 + 2 ?", "New"]) == [(0, 0), (2, 0)]
