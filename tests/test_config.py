"""A mistake in a config is refused in one line that names the key, before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default, demo
from opd_jax import config as configs
from opd_jax.errors import UserError
from opd_jax.job import check_workdir, prepare

ROOT = Path(__file__).parent.parent


def demo_with(**changes):
    config = demo.get_config()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"release__rule": "papr"}, "release.rule=papr is not known (did you mean paper?)"),
        ({"release__min_segments": 1}, "release.min_segments=1"),
        ({"scoring__candidates": 1}, "scoring.candidates=1"),
        ({"train__micro_batch": 3}, "train.micro_batch=3"),
        ({"student__path": ""}, "student.path is not set"),
        ({"data__heldout": 0}, "eval.every"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_key(changes, message):
    with pytest.raises(UserError) as error:
        configs.validate(demo_with(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh.data=3"),
        ({"mesh__fsdp": 5}, "mesh.fsdp=5"),
        ({"teacher__path": "/nowhere/model"}, "teacher.path"),
        ({"student__drop_layers": (30,)}, "student.drop_layers=(30,)"),
        ({"rollout__max_tokens": 100_000}, "rollout.max_tokens"),
        ({"data__prompt_tokens": 16}, "data.prompt_tokens"),
    ],
)
def test_a_config_that_does_not_fit_machine_or_models_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        prepare(demo_with(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_workdir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_workdir(tmp_path / "file" / "run", demo.get_config())


def test_the_default_config_has_every_checked_field():
    config = default.get_config()
    for key in [*configs.ALLOWED, *configs.RANGES]:
        configs.get(config, key)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.release.rul=none", "did you mean release.rule"),
        ("--config.release.rule=papr", "did you mean paper"),
    ],
)
def test_the_command_line_ends_a_mistake_in_one_line_and_status_2(argument, message, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "opd_jax.train", "--config=configs/demo.py"),
            *(f"--workdir={tmp_path}/run", argument),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
