"""A look at the first step's rollouts is what that step then records."""

import json

import jax
import pytest

from opd_jax.run import long_job
from opd_jax.run.job import prepare
from opd_jax.run.look import AT_LENGTH, preview
from opd_jax.train import train
from tests import tiny


@pytest.mark.parametrize(
    "settings",
    [
        {"release.rule": "paper", "segments.kind": "fixed:2"},
        {"release.rule": "random", "segments.kind": "fixed:2", "scoring.student": "recompute"},
        {
            "data.source": "mixture",
            "data.mixture": ("1 jsonl:{models}/prompts.jsonl", "3 jsonl:{models}/others.jsonl"),
            "data.prompt_buckets": (40,),
            "rollout.samples_per_prompt": 2,
            "segments.kind": "fixed:2",
        },
    ],
    ids=["paper", "a rule that draws", "groups of a mixture, in a narrower width"],
)
def test_look_shows_the_rollouts_of_the_first_step_and_learns_nothing(models, tmp_path, settings):
    if "data.mixture" in settings:
        lines = [json.dumps({"prompt": f"Other {n}?"}) for n in range(12)]
        (models / "others.jsonl").write_text("\n".join(lines) + "\n")
        mixture = tuple(part.format(models=models) for part in settings["data.mixture"])
        settings = settings | {"data.mixture": mixture}
    sizes = {"train.steps": 1, "train.micro_batch": 4, "metrics.rollouts": 8}
    off = {"eval.every": 0, "checkpoint.every": 0}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    job = prepare(tiny.config(models, **sizes, **off, **mesh, **settings))
    start = job.start()
    before = jax.device_get(start.params)
    seen = preview(job, start.params, job.teacher_params())
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, jax.device_get(start.params)))
    train(job, tmp_path / "run")
    recorded = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert len(seen) == len(recorded) == 8
    assert any(len(record["sentences"]) > 1 for record in seen)
    for ours, theirs in zip(seen, recorded, strict=True):
        assert ours.pop("gain") == pytest.approx(theirs.pop("gain"), abs=1e-3)
        assert (ours.pop("step"), theirs.pop("step")) == (0, 1)
        mine, others = ours.pop("sentences"), theirs.pop("sentences")
        assert ours == theirs
        for a, b in zip(mine, others, strict=True):
            for name in ("contrast", "advantage"):
                assert a.pop(name) == pytest.approx(b.pop(name), abs=1e-4)
            assert a == b


def test_a_look_at_long_answers_asks_for_length_and_cuts_by_the_papers_rule(models):
    config = tiny.config(models, **{"release.rule": "none", "eval.every": 2})
    job = long_job(config, answers=8, answer_tokens=16)
    assert config.release.rule == "none" and config.data.instruction == ""  # the run's own stays
    records = preview(job, job.start().params, job.teacher_params())
    assert len(records) == 8
    for record in records:
        assert AT_LENGTH in record["prompt"]
        assert 0 < record["tokens"] <= 16
        assert sum(sentence["tokens"] for sentence in record["sentences"]) == record["tokens"]
