"""Prompts of many origins: columns, generators, mixtures, earlier turns, and what evaluation shares."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from opd_jax import data
from opd_jax.config import default
from opd_jax.data.prompts import generated, records, sources
from opd_jax.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def load(tokenizer, **changes):
    section = default().data
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


def write_as(kind, path, records) -> str:
    if kind == "jsonl":
        return write(path.with_suffix(".jsonl"), records)
    pa.parquet.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_usual_data_sets_are_read_by_their_name_or_by_their_columns(tokenizer, tmp_path, name, kind):
    record, columns, answer = SCHEMAS[name]
    path = write_as(kind, tmp_path / name, [record])
    for source, named in ((kind, columns), (name, {})):
        columns = {"prompt": "", "answer": ""} | named
        prompts = load(tokenizer, source=source, path=path, columns=columns).train
        assert [(p.text, p.answer) for p in prompts] == [("Q?", answer)]
    mixed = load(tokenizer, source="mixture", mixture=(f"1 {name}:{path}",)).train
    assert [(p.text, p.answer) for p in mixed] == [("Q?", answer)]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_of_another_schema_is_refused_by_the_columns_it_lacks(tokenizer, tmp_path, name, kind):
    wanted = sources.datasets()[name]
    path = write_as(kind, tmp_path / "other", [{"instruction": "Q?", "output": "7"}])
    with pytest.raises(UserError) as caught:
        load(tokenizer, source=name, path=path)
    said = str(caught.value)
    assert f"lacks {wanted['prompt']} and {wanted['answer']}; {wanted['title']} has" in said
    assert "it has instruction, output" in said and "\n" not in said
    with pytest.raises(UserError, match=f"data.columns is not read by data.source={name}"):
        load(tokenizer, source=name, path=path, columns={"prompt": "instruction"})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_answer_column_that_no_record_has_is_refused(tokenizer, tmp_path, kind):
    path = write_as(kind, tmp_path / "a", [{"prompt": text, "answer": "1"} for text in ("Q?", "R?")])
    with pytest.raises(UserError, match=r"data.columns.answer=solution: no record .* it has answer, prompt"):
        load(tokenizer, source=kind, path=path, columns={"answer": "solution"})


def test_only_the_columns_that_are_looked_at_are_read_of_a_parquet_file(tokenizer, tmp_path, monkeypatch):
    record, _, _ = SCHEMAS["deepmath"]
    path = write_as("parquet", tmp_path / "deepmath", [record])
    read, seen = pa.parquet.read_table, []

    def read_table(path, columns):
        seen.append(columns)
        return read(path, columns=columns)

    monkeypatch.setattr(pa.parquet, "read_table", read_table)
    load(tokenizer, source="deepmath", path=path)
    assert seen == [["question", "final_answer"]]


def test_exact_copies_are_left_out_and_counted_unless_they_are_wanted(tokenizer, tmp_path):
    record, _, _ = SCHEMAS["dapo"]
    other = record | {"prompt": [{"role": "user", "content": "R?"}]}
    path = write(tmp_path / "dapo.jsonl", [record, other, record, record])
    prompts = load(tokenizer, source="dapo", path=path)
    assert ([p.text for p in prompts.train], prompts.repeated) == (["Q?", "R?"], 2)
    assert "left out: 0 too long, 2 repeated" in str(prompts)
    assert load(tokenizer, source="dapo", path=path, repeats="keep").repeated == 0
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b"}])
    assert "1 training prompts have no answer" in str(load(tokenizer, path=path))


class Fetched(tfds.core.GeneratorBasedBuilder):
    """Stands for what TFDS makes of a Hugging Face data set: its columns, in a split named train."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "final_answer": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": iter([(0, {"question": "Q?", "final_answer": "7"})])}

    def _generate_examples(self):
        yield from ()


def test_a_hugging_face_name_is_read_through_tfds(tokenizer, tmp_path, monkeypatch):
    asked = []

    def builder(name, **options):
        asked.append(name)
        return Fetched(data_dir=str(tmp_path), file_format="array_record")

    monkeypatch.setattr(tfds.core.dataset_builders.huggingface_dataset_builder, "builder", builder)
    columns = {"prompt": "question", "answer": "final_answer"}
    prompts = load(tokenizer, source="tfds", path="huggingface:owner__math", columns=columns).train
    assert [(p.text, p.answer) for p in prompts] == [("Q?", "7")]
    assert asked and "math" in str(asked[0])
    columns["answer"] = "solution"
    with pytest.raises(UserError, match=r"data.columns.answer=solution: no record"):
        load(tokenizer, source="tfds", path="huggingface:owner__math", columns=columns)


def test_a_hugging_face_name_without_its_package_or_the_network_ends_in_one_line(tokenizer):
    with pytest.raises(UserError, match=r"nobody__nothing: TFDS cannot fetch it .*datasets") as caught:
        load(tokenizer, source="tfds", path="huggingface:nobody__nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "is not UTF-8 text"),
        ("a.json", b'[{"prompt": "caf\xe9"}]', "is not UTF-8 text"),
        ("a.csv", b"prompt\ncaf\xe9\n", "is not UTF-8 text"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000 + b'"\n', None),
    ],
)
def test_another_encoding_is_refused_and_a_long_field_is_read(tokenizer, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    if said is None:
        assert len(records.read(str(tmp_path / name), "data.path")[0]["prompt"]) == 200_000
        return
    with pytest.raises(UserError, match=said) as caught:
        load(tokenizer, path=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_csv_field_past_all_reason_ends_in_one_line(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"' + "x" * 200 + '"\n')
    before = csv.field_size_limit(100)
    try:
        with pytest.raises(UserError, match="is not a readable CSV file"):
            records.read(str(tmp_path / "a.csv"), "data.path")
    finally:
        csv.field_size_limit(before)


def test_a_task_that_needs_settings_is_refused_in_one_line(tokenizer):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="cannot generate 'composite'") as caught:
        load(tokenizer, source="rg:composite")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source, near", [("jsnl", "jsonl"), ("deepmth", "deepmath"), ("mixtur", "mixture")])
def test_a_misspelt_source_is_told_the_nearest(tokenizer, source, near):
    with pytest.raises(UserError, match=f"did you mean {near}"):
        load(tokenizer, source=source)


def test_a_pattern_reads_all_its_files_in_order_and_one_that_fits_none_is_refused(tokenizer, tmp_path):
    for part in (1, 0):
        write(tmp_path / f"part-{part}.jsonl", [{"prompt": f"{part}?"}])
    prompts = load(tokenizer, path=str(tmp_path / "part-*.jsonl")).train
    assert [p.text for p in prompts] == ["0?", "1?"]
    with pytest.raises(UserError, match="no file has such a name"):
        load(tokenizer, path=str(tmp_path / "other-*.jsonl"))


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


def test_a_parquet_text_that_is_not_utf8_is_refused(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    latin = pyarrow.array([b"What is \xbf1?"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": latin}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet: not a readable parquet file \('utf-8' codec"):
        load(tokenizer, source="parquet", path=str(tmp_path / "p.parquet"), heldout=0)


def test_generated_problems_are_the_same_whatever_the_hash_seed_of_the_process():
    """Both generators draw from sets, which Python orders by that seed."""
    pytest.importorskip("reasoning_gym")
    program = (
        "import json; from opd_jax.data.prompts.generated import generate\n"
        "tasks = ('word_ladder', 'isomorphic_strings')\n"
        "print(json.dumps([generate(task, 6, 7, 'here') for task in tasks]))"
    )
    found = []
    for seed in ("1", "2"):
        environment = generated.generator_environment() | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] and [len(pairs) for pairs in found[0]] == [6, 6]


def test_a_mixture_takes_rows_by_weight_whatever_the_sizes(tokenizer, tmp_path):
    few = write(tmp_path / "few.jsonl", [{"q": f"few {i}"} for i in range(5)])
    many = write(tmp_path / "many.jsonl", [{"prompt": f"many {i}"} for i in range(200)])
    mixture = (f"3 jsonl:{few} prompt=q", f"1 jsonl:{many}")
    prompts = load(tokenizer, source="mixture", mixture=mixture, heldout=20)
    assert sum(count for count, _ in prompts.parts) == len(prompts.train) == 185
    assert not {p.text for p in prompts.train} & {p.text for p in prompts.heldout}

    def rows(steps, start=None):
        batches = data.TrainingBatches(
            prompts.train, data.Batching(8, 64, 0), seed=1, start=start, parts=prompts.parts
        )
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
        parts = [(n, w + 1) for n, w in prompts.parts]
        data.TrainingBatches(prompts.train, data.Batching(8, 64, 0), seed=1, start=state, parts=parts)


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
