"""Lengths of responses for benchmarks: their distribution, and files of real runs."""

import json

import numpy as np
import pytest

from opd_jax.errors import UserError
from opd_jax.preflight.lengths import response_lengths


def test_full_is_the_limit_of_every_row():
    assert response_lengths("full", 3, 40).tolist() == [40, 40, 40]


def test_lognormal_lengths_have_the_mean_and_spread_that_were_asked_for():
    found = response_lengths("lognormal:0.2:0.5", 20_000, 10_000)
    assert abs(found.mean() / 10_000 - 0.2) < 0.005
    assert abs(np.log(found).std() - 0.5) < 0.01
    assert response_lengths("lognormal:0.9:1", 1000, 100).max() == 100
    assert response_lengths("lognormal:0.001:0.1", 10, 100).min() == 1
    np.testing.assert_array_equal(found, response_lengths("lognormal:0.2:0.5", 20_000, 10_000))


def test_lengths_of_a_run_are_those_of_its_rollouts(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps({"tokens": n}) + "\n" for n in (7, 30, 90)))
    found = response_lengths(str(file), 300, 64)
    assert set(found) == {7, 30, 64}


@pytest.mark.parametrize("spec", ["lognormal:0.3", "lognormal:a:b", "lognormal:-1:1", "lognormal:0.3:nan"])
def test_a_wrong_distribution_is_a_mistake(spec):
    with pytest.raises(UserError, match="such as lognormal:0.3:0.7"):
        response_lengths(spec, 4, 10)


@pytest.mark.parametrize("text", [None, "", "{}\n", "no json\n", "[1]\n"])
def test_a_file_without_lengths_is_a_mistake(tmp_path, text):
    file = tmp_path / "rollouts.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="--lengths="):
        response_lengths(str(file), 4, 10)
