"""A run while it goes on: what stops it."""

import numpy as np
import pytest

from opd_jax.errors import UserError
from opd_jax.run import StepReader
from tests import tiny


def measured(skipped):
    return {"loss": np.float32("nan" if skipped else 1), "response_tokens": 5, "skipped_updates": skipped}


def steps(tmp_path, skips, **overrides):
    """The last step that was read of a run with these numbers of skipped updates."""
    config = tiny.config(tmp_path, **overrides)
    with tiny.writer(tmp_path) as writer:
        reader = StepReader(writer, config)
        for step, skipped in enumerate(skips, 1):
            reader.begin(step, measured(skipped))
            reader.finish()
    return len(skips)


def test_a_run_stops_after_more_skipped_updates_in_a_row_than_are_allowed(tmp_path):
    with pytest.raises(UserError, match=r"step 5: .* in 3 updates in a row, more than train.max_skips=2"):
        steps(tmp_path, [0, 0, 1, 1, 1, 0], **{"train.max_skips": 2})
    with pytest.raises(UserError, match="step 1: "):
        steps(tmp_path, [1], **{"train.max_skips": 0})


def test_an_update_that_counts_starts_the_row_anew(tmp_path):
    assert steps(tmp_path, [1, 1, 0, 1, 1, 0], **{"train.max_skips": 2}) == 6
    two = {"train.max_skips": 2, "train.updates_per_rollout": 2}
    assert steps(tmp_path, [1, 1, 1, 2, 1, 2], **two) == 6
