"""The loop with objectives that change who writes and what the host does between two programs."""

import json

import jax
import numpy as np
import pytest

from opd_jax.parallel import sharding
from opd_jax.run.job import prepare
from opd_jax.train import train
from tests import tiny


@pytest.fixture(scope="module")
def with_answers(models):
    """A JSONL file in which half of the prompts have an answer."""
    path = models / "answers.jsonl"
    lines = [
        json.dumps({"prompt": f"What is {n} + 1?"} | ({"answer": str(n + 1)} if n % 2 else {}))
        for n in range(24)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(models, workdir, **overrides):
    """(job, final state, training records) of three steps."""
    settings = {"train.steps": 3, "eval.every": 0, "checkpoint.every": 0, "metrics.rollouts_every": 0}
    job = prepare(tiny.config(models, **settings | overrides))
    state = train(job, workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return job, state, records


def test_sft_trains_on_what_the_teacher_writes_and_grades_nothing(models, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("graded without a reward.weight")

    monkeypatch.setattr("opd_jax.evaluation.rewards.reward_batch", never)
    job, state, records = run(models, tmp_path, **{"objective.name": "sft", "release.rule": "none"})
    assert int(state.step) == len(records) == 3
    assert job.teacher_writes
    assert "sample" not in job.__dict__, "the student's sampler was compiled"
    # random models are far apart: the teacher's text is its own likeliest, not the student's
    assert all(record["kl"] > 0.1 and record["loss"] > 0 for record in records)


def test_rewards_are_graded_between_sampling_and_the_step_without_an_implicit_transfer(
    models, with_answers, tmp_path
):
    overrides = {
        "objective.name": "aopd",
        "reward.weight": 1.0,
        "data.path": str(with_answers),
        "data.heldout": 0,
    }
    _, state, records = run(models, tmp_path, **overrides)
    assert all(np.isfinite(record["loss"]) for record in records)
    assert all(0 <= record["reward"] <= 1 for record in records)
    graded = [record["graded_share"] for record in records]
    assert sum(graded) == pytest.approx(3 * 0.5)  # 24 rows: every prompt once
    assert all(record["teacher_entropy"] > 0 for record in records)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_samples_of_one_prompt_are_graded_by_its_answer_and_train_together(
    models, with_answers, tmp_path, monkeypatch
):
    seen = []

    def graded(mesh, tokenizer, grader, answers, rollouts):
        tokens_BL = sharding.local_values(rollouts.tokens_BL)
        seen.append((answers, [tokenizer.decode(row[row < tiny.PAD]) for row in tokens_BL]))
        return sharding.put_batch(mesh, np.ones(len(answers), np.float32))

    monkeypatch.setattr("opd_jax.evaluation.rewards.reward_batch", graded)
    overrides = {
        "rollout.batch": 16,
        "rollout.samples_per_prompt": 2,
        "reward.weight": 1.0,
        "data.path": str(with_answers),
        "data.heldout": 0,
    }
    _, _, records = run(models, tmp_path, **overrides)
    assert len(records) == len(seen) == 3
    for answers, texts in seen:
        numbers = [int(text.split("What is ")[1].split(" +")[0]) for text in texts]
        assert numbers[::2] == numbers[1::2] and len(set(numbers)) == 8
        assert answers == [str(n + 1) if n % 2 else None for n in numbers]
        assert texts[0] != texts[1]
