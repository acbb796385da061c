"""The wheel holds all that a run needs: it is built, installed into an empty folder and trains from there."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]
SOURCES = ("opd_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# Before 70.1 it needs the package wheel.
if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
    pytest.skip("needs setuptools 70.1 or newer: pip install -e '.[test]'", allow_module_level=True)
CONFIG = """
from opd_jax import config


def get_config():
    c = config.default()
    c.update_from_flattened_dict({values!r})
    return c
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders in its source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The environment of commands that find the installed package, and not this checkout."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return os.environ | {"PYTHONPATH": str(target)}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def elsewhere(tmp_path):
    """A working folder that has a folder configs of its own, with another demo."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('the decoy was imported')\n")
    (tmp_path / "configs" / "demo.py").write_text("raise RuntimeError('the decoy was run')\n")
    return tmp_path


def test_the_wheel_has_the_recipes_and_data_files_and_no_studies(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, at in (("configs", "opd_jax/recipes"), ("configs/ablations", "opd_jax/recipes/ablations")):
        for file in (ROOT / folder).glob("*.py"):
            assert f"{at}/{file.name}" in names
    for file in (ROOT / "opd_jax").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in names
    others = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert others == {"opd_jax"}
    assert not any("recipes/study" in name or name.endswith(".safetensors") for name in names)


def test_a_recipe_is_found_by_its_name_and_a_file_by_its_path(installed, elsewhere):
    code = """
import json, pathlib, opd_jax
from opd_jax import config
from opd_jax.config.recipes import find
found = map(find, ("demo", "ablations/rule", "configs/demo.py"))
print(json.dumps([opd_jax.__file__, *map(str, found)]))
print(config.load("demo").train.steps, config.load("smollm2").student.path)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=installed,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    package, demo, rule, path = json.loads(done.stdout.splitlines()[0])
    recipes = Path(package).parent / "recipes"
    assert Path(installed["PYTHONPATH"]) in recipes.parents
    assert (demo, rule) == (str(recipes / "demo.py"), str(recipes / "ablations" / "rule.py"))
    assert path == "configs/demo.py"


def test_the_installed_package_trains_from_a_config_file_anywhere(installed, elsewhere, models):
    values = {"train.steps": 1, "eval.every": 0, "checkpoint.every": 0, "metrics.rollouts_every": 0}
    settings = tiny.config(models, **values)
    flat = {key: value for key, value in flattened(settings.to_dict()) if key != "plugins"}
    (elsewhere / "mine.py").write_text(CONFIG.format(values=flat))
    command = [sys.executable, "-m", "opd_jax.train", "--config=mine.py", "--workdir=run"]
    done = subprocess.run(command, cwd=elsewhere, env=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (elsewhere / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1]
    for command, status, says in (
        (["opd_jax.report", "--workdir=run"], 0, "run/report.html"),
        (["opd_jax.train", "--config=demo", "--config.nosuch=1"], 2, "--config.nosuch: no such field"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=elsewhere, env=installed, capture_output=True, text=True
        )
        assert done.returncode == status and says in done.stdout + done.stderr


def flattened(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
