"""What a job checks before anything is compiled."""

import numpy as np
import pytest

from opd_jax import data
from opd_jax.errors import UserError
from opd_jax.parallel import distributed
from opd_jax.run import job
from tests import tiny


def prompts(*ids):
    return [data.Prompt((i, i + 1), "text", None) for i in ids]


def test_prompts_that_another_process_read_differently_are_refused_by_their_key(monkeypatch):
    lists = {"data.path": prompts(1, 2), "eval.benchmark=ours": prompts(3)}
    job.check_same_everywhere(lists)

    def of_three(values):
        """Process 2 read other prompts of the second list."""
        own = np.asarray(values)
        other = own.copy()
        other[1, 0] ^= 1
        return np.stack([own, own, other])

    monkeypatch.setattr(distributed, "gathered", of_three)
    with pytest.raises(UserError, match="^eval.benchmark=ours: processes 2 read other prompts than"):
        job.check_same_everywhere(lists)


def test_the_order_of_prompts_is_part_of_their_digest():
    assert data.digest(prompts(1, 2)) != data.digest(prompts(2, 1))
    assert data.digest(prompts(1, 2)) == data.digest(prompts(1, 2))


def test_training_on_greedy_draws_is_refused_by_objectives_that_read_advantages(models, tmp_path):
    greedy = tiny.config(models, **{"rollout.temperature": 0.0})
    with pytest.raises(UserError, match="rollout.temperature=0 .*objective.name=policy_gradient"):
        job.prepare(greedy, tmp_path)
    greedy.objective.name = "reverse_kl"
    job.prepare(greedy, tmp_path)
