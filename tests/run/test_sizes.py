"""Sizes of a run, checked against the devices before anything is compiled."""

import jax
import pytest

from opd_jax.config import load
from opd_jax.errors import UserError
from opd_jax.parallel import sharding
from opd_jax.preflight import plan as preflight
from opd_jax.run import sizes
from tests import tiny


def test_the_demos_sizes_can_be_cut_over_the_devices_of_two_processes(models, caplog):
    config = load("demo")
    pair = {f"{model}.path": str(models / model) for model in ("student", "teacher")}
    config.update_from_flattened_dict(pair | {"student.drop_layers": ()})
    with caplog.at_level("WARNING"):
        plan = preflight.plan(config, jax.devices())
    assert plan.config.train.micro_batch == plan.mesh.size == 8
    assert caplog.messages == [
        "train.micro_batch=4 is raised to 8: a rollout for each of 8 devices (mesh.data x mesh.fsdp)"
    ]


def test_a_micro_batch_that_the_mesh_can_cut_is_left_alone_and_a_larger_uneven_one_is_refused(models):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for asked, made in ((8, 8), (4, 4), (1, 4)):
        config = tiny.config(models, **{"rollout.batch": 24, "train.micro_batch": asked})
        sizes.fill_micro_batch(config, mesh)
        assert config.train.micro_batch == made
    with pytest.raises(UserError, match=r"train\.micro_batch=6 cannot be cut over 4 devices"):
        sizes.fill_micro_batch(tiny.config(models, **{"train.micro_batch": 6}), mesh)
