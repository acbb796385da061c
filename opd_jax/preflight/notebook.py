"""Functions for colab/qwen3.ipynb: the config, preflight in a process of its own, downloading."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from opd_jax import config as configs
from opd_jax.errors import UserError
from opd_jax.models.files import PREFIX

DEMO_PROMPTS = {"data.source": "demo", "data.path": ""}


def settings(steps: int, prompts: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a notebook's parameters into changes of a recipe: dotted key -> value.

    Args:
      steps: train.steps.
      prompts: a JSONL file; "" stands for the demo's prompts.
      overrides: further fields, which take precedence.
    """
    source = {"data.source": "jsonl", "data.path": prompts} if prompts else DEMO_PROMPTS
    return {**source, "data.over_long": "drop", "train.steps": steps, **overrides}


def config(recipe: str, changes: Mapping[str, Any]) -> ConfigDict:
    """A recipe with changes.

    Raises:
      UserError: a change names no field, or has the wrong type.
    """
    c = configs.load(recipe, plugins=changes.get("plugins", ()))
    for key, value in changes.items():
        try:
            configs.get(c, key)
            c.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{key}={value!r} does not fit docs/configs.md ({error.args[0]})") from error
    return c


def preflight(recipe: str, student: str, teacher: str, changes: Mapping[str, Any], topology: str) -> None:
    """Compiles the run for a slice, in a process of its own so that this one does not hold the chip yet.

    Args:
      student, teacher: folders, or names on the Hub that are presets (models/files/presets.py).
      changes: the changes that `config` gets, so that the compiled run is the one that will be trained.
      topology: such as v5e:1x1; "" skips preflight.

    Raises:
      UserError: the run does not fit or cannot be compiled; preflight's output says why.
    """
    if not topology:
        return
    changes = {"student.path": _sized(student), "teacher.path": _sized(teacher)} | dict(changes)
    command = [sys.executable, "-m", "opd_jax.preflight", f"--config={recipe}", f"--topology={topology}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        raise UserError(
            f"preflight for {topology} ended with status {done.returncode}, for the reason above; change the"
            " notebook's OVERRIDES, or TOPOLOGY='' to skip it"
        )


def fetch(name: str) -> str:
    """The folder of a model: `name` if it is a folder, else the downloaded copy in the Hub's cache."""
    from huggingface_hub import snapshot_download

    return name if os.path.isdir(name) else snapshot_download(name)


def _sized(name: str) -> str:
    return name if os.path.isdir(name) else PREFIX + Path(name).name
