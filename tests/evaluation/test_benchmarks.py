"""Benchmarks: problems from files and generators, answers counted, and the entry points."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from opd_jax import compare as compare_entry
from opd_jax import evaluate
from opd_jax.data.prompts.sources import Conversation
from opd_jax.errors import UserError
from opd_jax.evaluation import answering
from opd_jax.evaluation import paired as compare
from opd_jax.evaluation import tasks as benchmarks
from opd_jax.evaluation.grading import Grader, Verdict
from opd_jax.evaluation.tasks import Benchmark, Problem
from opd_jax.parallel import distributed
from opd_jax.run import of_model
from opd_jax.run.job import prepare
from opd_jax.train import train
from tests import tiny


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# One record of each usual file, as its card shows it, and the reference that must come of it.
RECORDS = {
    "aime24": ({"problem": "P", "answer": "204", "solution": "..."}, "204"),
    "aime25": ({"problem": "P", "answer": "70"}, "70"),
    "hmmt25_feb": ({"problem": "P", "answer": "\\frac{1}{576}"}, "\\frac{1}{576}"),
    "amc23": ({"question": "P", "answer": 27.0}, "27.0"),
    "math500": ({"problem": "P", "solution": "...", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}, None),
    "minerva": ({"problem": "P", "solution": "So \\boxed{3.6e5} \\mathrm{~m}"}, "3.6e5"),
    "gsm8k": ({"question": "P", "answer": "9*2=<<9*2=18>>18\n#### 1,018"}, "1,018"),
    "ours": ({"prompt": "P", "answer": "x"}, "x"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_usual_files_give_their_problem_and_reference(tmp_path, name):
    record, answer = RECORDS[name]
    path = write(tmp_path / "file.jsonl", [record])
    (problem,) = benchmarks.load(f"{name}:{path}").problems
    assert problem.question == "P"
    assert problem.text == f"P\n\n{benchmarks.BOXED}"
    assert problem.answer == (answer or record["answer"])


def test_choices_are_shuffled_by_the_question_and_the_letter_is_that_of_the_right_one(tmp_path):
    rows = ["Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"]
    rows += [f"Which {n}?,right,wrong a,wrong b,wrong c" for n in range(40)]
    (tmp_path / "gpqa.csv").write_text("\n".join(rows) + "\n")
    problems = benchmarks.load(f"gpqa:{tmp_path / 'gpqa.csv'}").problems
    assert all(f"({problem.answer}) right" in problem.text for problem in problems)
    assert {problem.answer for problem in problems} == set("ABCD")
    assert problems == benchmarks.load(f"gpqa:{tmp_path / 'gpqa.csv'}").problems


def test_built_in_problems_need_no_file():
    champ = benchmarks.load("champ").problems
    assert len(champ) == 270
    assert champ[0].answer == "239"
    pytest.importorskip("reasoning_gym")
    generated = benchmarks.load("rg:chain_sum:7").problems
    assert [problem.generator[3] for problem in generated] == list(range(7))


@pytest.mark.parametrize(
    "spec, said",
    [
        ("math50", "name the file"),
        ("math500:/nowhere.jsonl", "no such file"),
        ("gpqa:{file}", "Incorrect Answer 1"),
        ("rg:chain_sm", "did you mean chain_sum"),
        ("rg:chain_sum:many", "no number of problems"),
        ("a/b:{file}", "names files"),
    ],
)
def test_a_benchmark_that_is_not_there_ends_in_one_line(tmp_path, spec, said):
    file = write(tmp_path / "a.jsonl", [{"question": "P", "answer": "1"}])
    with pytest.raises(UserError, match=said) as caught:
        benchmarks.load(spec.format(file=file))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def questions(models):
    rows = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(5)]
    return write(models / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def job(models, questions):
    overrides = {
        "eval.benchmark": (f"ours:{questions}",),
        "eval.samples": 2,
        "eval.benchmark_every": 2,
        "data.prompt_tokens": 128,
        "rollout.max_tokens": 13,  # as nowhere else, so that what is compiled of its sampler can be counted
        "train.steps": 3,
        "eval.every": 0,
    }
    return prepare(tiny.config(models, **overrides))


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("examined")
    train(job, workdir)
    return workdir


def scripted(job, replies):
    """A response_sampler that writes these replies instead of sampling, in the order of the rows."""
    whole = iter(replies)

    def sample(params, tokens_BP, mask_BP, key, step):
        texts = [next(whole, "") for _ in range(len(tokens_BP))]
        rollouts = tiny.written(texts, tiny.STUDENT, tiny.student_params(), width=16)
        finished_B = np.array([not text.startswith("long") for text in texts])
        return answering.sharding.put_batch(job.mesh, rollouts.replace(finished_B=finished_B))

    response_sampler = job.response_sampler()
    return dataclasses.replace(
        response_sampler, draw=dataclasses.replace(response_sampler.draw, sample=sample)
    )


def test_every_response_is_counted_once_with_its_own_problem(job):
    replies = ["It is 0", "It is 1", "It is 2", "It is 2", "It is 5", "long", "6", "7", "It is 8", "9"]
    result = answering.answer(job.rendered_benchmarks[0], scripted(job, replies), {}, 2)
    assert [row["right"] for row in result["rows"]] == [[1, 0], [1, 1], [0, 0], [1, 0], [1, 0]]
    assert result["accuracy"] == 0.5
    # One of two is right with certainty in all problems but the third; no other k is reported.
    assert [name for name in result if name.startswith("pass_")] == ["pass_2"]
    assert result["pass_2"] == pytest.approx(0.8)
    assert result["accuracy_low"] < 0.5 < result["accuracy_high"]
    assert (result["finished_share"], result["problems"], result["samples"]) == (0.9, 5, 2)
    lengths = [min(len(reply), 15) + 1 for reply in replies]
    assert result["response_length"] == pytest.approx(np.mean(lengths))
    assert result["rows"][3]["responses"] == ["6", "7"]


def test_pass_at_k_is_reported_for_powers_of_two_and_for_all_samples(job):
    rendered = dataclasses.replace(job.rendered_benchmarks[0], prompts=job.rendered_benchmarks[0].prompts[:1])
    rendered = dataclasses.replace(rendered, benchmark=Benchmark("one", rendered.benchmark.problems[:1], 1))
    result = answering.answer(rendered, scripted(job, ["It is 1"] * 5 + ["It is 0"]), {}, 6)
    assert {name: v for name, v in result.items() if name.startswith("pass_")} == {
        "pass_2": pytest.approx(1 / 3),
        "pass_4": pytest.approx(2 / 3),
        "pass_6": 1.0,
    }


def test_the_held_out_prompts_with_answers_are_a_benchmark(job):
    heldout = [dataclasses.replace(p, answer="So\n#### 4") for p in job.prompts.heldout[:2]]
    unanswered = list(job.prompts.heldout[2:])
    (rendered,) = answering.prepare(
        ["heldout"], job.tokenizer, job.config.data, heldout=[*heldout, *unanswered]
    )
    assert rendered.prompts == heldout and rendered.benchmark.name == "heldout"
    assert [p.answer for p in rendered.benchmark.problems] == ["4", "4"]
    with pytest.raises(UserError, match="heldout needs held-out prompts with answers"):
        answering.prepare(["heldout"], job.tokenizer, job.config.data, heldout=unanswered)


def test_a_hostile_response_is_wrong_and_counted_as_ungraded(job):
    rendered = answering.RenderedBenchmark(
        Benchmark("one", (Problem("Q", "Q", "7"),), 1), job.rendered_benchmarks[0].prompts[:1]
    )
    with Grader(1, seconds=1) as grader:
        says = _Says("\\boxed{9^{9^{9^{9}}}}")
        response_sampler = dataclasses.replace(scripted(job, [""]), grader=grader, tokenizer=says)
        result = answering.answer(rendered, response_sampler, {}, 1)
    assert (result["accuracy"], result["ungraded"]) == (0, 1)
    assert result["rows"][0]["failed"] == ["time"]


class _Says:
    """A tokenizer that reads one text whatever the tokens are."""

    def __init__(self, text):
        self._text = text

    def decode(self, ids, skip_special_tokens=False):
        return self._text


def test_benchmarks_run_in_training_on_the_program_that_samples(finished, job):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    examined = [record for record in records if record["kind"] == "benchmark"]
    assert [record["step"] for record in examined] == [0, 2, 3]
    assert all(record["benchmark"] == "ours" for record in examined)
    assert all(0 <= record["accuracy"] <= 1 for record in examined)
    rows = [json.loads(line) for line in (finished / "benchmarks" / "ours-3.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [2] * 5
    assert job.sample._cache_size() == 1, "another sampler was compiled"


def benchmark_steps(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] == "benchmark"]


def test_benchmarks_that_a_stop_left_no_time_for_are_made_up_once(finished, job, tmp_path):
    told = tiny.told_to_stop(job, 2)
    with pytest.raises(distributed.Preempted):
        train(told, tmp_path)
    assert benchmark_steps(tmp_path) == [0]
    train(job, tmp_path)
    assert benchmark_steps(tmp_path) == [0, 2, 3]
    train(job, tmp_path)
    assert benchmark_steps(tmp_path) == [0, 2, 3]
    for step in (2, 3):
        name = f"benchmarks/ours-{step}.jsonl"
        assert (tmp_path / name).read_text() == (finished / name).read_text()


def test_two_benchmarks_of_one_name_are_refused(job, questions):
    with pytest.raises(UserError, match="ours is there more than once"):
        answering.prepare([f"ours:{questions}"] * 2, job.tokenizer, job.config.data)


def test_results_are_found_by_name_and_newest_step(finished, tmp_path):
    rows = (finished / "benchmarks" / "ours-3.jsonl").read_text()
    for name in ("a-b-9", "a-b-10", "a-b-10-greedy", "c-model", "notes"):
        (tmp_path / f"{name}.jsonl").write_text(rows if name != "a-b-9" else rows.splitlines()[0])
    found = compare.measured(tmp_path)
    assert {name: len(measured.text_N) for name, measured in found.items()} == {
        "a-b": 5,
        "a-b (greedy)": 5,
        "c": 5,
    }


def test_the_entry_answers_as_training_did_or_a_folder_alone(finished, models, questions, tmp_path):
    spec = f"--benchmark=ours:{questions}"
    done = tiny.entry("opd_jax.evaluate", f"--workdir={finished}", spec, "--samples=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    theirs, ours = (
        [json.loads(line) for line in (folder / "ours-3.jsonl").read_text().splitlines()]
        for folder in (finished / "benchmarks", tmp_path)
    )
    same = sum(a["responses"] == b["responses"] for a, b in zip(theirs, ours))
    assert same >= 4, "one device against eight may round a draw differently, but hardly more"
    shape = "--config.rollout.batch=8", "--config.rollout.max_tokens=12", "--config.data.prompt_tokens=128"
    arguments = f"--model={models / 'student'}", spec, "--temperature=0", f"--out={tmp_path}"
    done = tiny.entry("opd_jax.evaluate", *shape, "--config.student.compute_dtype=bfloat16", *arguments)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "ours-model-greedy.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "--workdir=DIR"),
        ({"model": "/nowhere"}, "--out=FOLDER"),
        ({"workdir": "/nowhere", "config": "given"}, "--workdir has its own config"),
        ({"model": "/nowhere", "out": "x"}, "--model: no folder /nowhere"),
    ],
)
def test_mistakes_on_the_command_line_are_refused_in_one_line(given, said):
    options = {"workdir": None, "model": None, "config": None, "step": "latest", "samples": None}
    options |= {"temperature": None, "out": None, "benchmark": ["champ"]} | given
    with pytest.raises(UserError, match=said) as caught:
        evaluate.answer_benchmarks(types.SimpleNamespace(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_alone_answers_in_the_dtype_of_the_config(models, dtype):
    settings = tiny.config(models, **{"student.compute_dtype": dtype})
    _, params = of_model(settings)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


def test_problems_that_training_has_too_are_reported_and_listed(job, tmp_path):
    prompts = dataclasses.replace(job.prompts)
    assert answering.shared_with_training(prompts, job.rendered_benchmarks) == []
    # Whatever stands before the last message, a system prompt of the record's own or earlier turns.
    copied = dataclasses.replace(prompts.train[0], text="Be brief.\n4 + 4 ?", question="4 + 4 ?")
    prompts = dataclasses.replace(prompts, train=[*prompts.train, copied])
    shared = answering.shared_with_training(prompts, job.rendered_benchmarks)
    found = [(r["evaluation"], r["problem"], r["train"]) for r in shared]
    assert found == [("ours", 4, len(prompts.train) - 1)]
    assert "1 in ours (such as '4 + 4?')" in answering.say_shared(shared)
    answering.write_shared(tmp_path, shared)
    (line,) = (tmp_path / "shared_prompts.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "Be brief.\n4 + 4 ?"


@pytest.mark.parametrize(
    "content",
    [b"", b"no json\n", b'{"step": 1}\n', b"[1]\n", b"\xff\n", b'{"problem": 0, "right": 1, "text": ""}\n'],
)
def test_what_is_no_file_of_results_is_refused_in_one_line(finished, tmp_path, capsys, content):
    (tmp_path / "wrong.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        compare_entry.main([str(finished), str(tmp_path / "wrong.jsonl")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {tmp_path / 'wrong.jsonl'} is no file of results")


def test_a_run_compared_with_itself_is_not_told_apart(finished, capsys):
    compare_entry.main([str(finished), str(finished)])
    said = capsys.readouterr().out
    assert "ours: " in said
    assert "p = 1 over 5 problems: not told apart" in said


def test_prompts_of_a_benchmark_carry_no_training_instruction(job):
    section = job.config.data.copy_and_resolve_references()
    section.instruction = "Box it."
    (rendered,) = answering.prepare(job.config.eval.benchmark, job.tokenizer, section)
    assert rendered.prompts == job.rendered_benchmarks[0].prompts
    conversation = Conversation([{"role": "user", "content": rendered.benchmark.problems[0].text}], "0")
    assert rendered.prompts[0].text == conversation.messages[0]["content"]


def test_every_reason_why_an_answer_was_not_graded_comes_through():
    reasons = ["", "time", "crash", "error"]
    grader = types.SimpleNamespace(grade=lambda tasks, told: [Verdict(False, task) for task in tasks])
    assert [verdict.failed for verdict in answering._grade(grader, reasons)] == reasons
