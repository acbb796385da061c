"""The page of the Python API: its examples run, and its names are what the packages export."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
NAMES = re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
STABLE = {
    "change_point",
    "release",
    "segment",
    "SegmentTable",
    "sample",
    "score",
    "make_train_step",
    "load",
    "save",
}


def test_the_examples_of_the_page_print_what_it_shows(models, tmp_path):
    model = models / "student"
    places = {"MODEL": str(model), "COPY": str(tmp_path / "copy")}
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, globs=places)
    assert tried > 30 and not failed


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_page_is_there_with_a_docstring(name):
    parent, _, last = name.rpartition(".")
    if name == "opd_jax.errors":
        found = importlib.import_module(name)
    else:
        found = getattr(importlib.import_module(parent), last)
    assert len(found.__doc__) > 40


def test_the_page_has_every_stable_name():
    assert {name.rpartition(".")[2] for name in NAMES} >= STABLE
