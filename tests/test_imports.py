"""The order of the rooms holds: who imports whom, by which door, and nothing is exported for nobody."""

import json
import re
from collections.abc import Iterator

import pytest

from docs.map import LEVELS, OUTSIDE, PACKAGE, ROOT, Import, Tree, picture, room

RANK = {name: level for level, names in enumerate(LEVELS) for name in names}
# opd_jax/__init__.py configures the allocator, before anything imports jax.
RANK[PACKAGE] = RANK["parallel"] + 1


@pytest.fixture(scope="module")
def repository():
    return Tree()


def against_the_order(tree: Tree) -> list[str]:
    """Imports of a room from its own level or a later one, and rooms that the order does not have."""
    return [
        f"{i.file}: {importing} imports {imported}"
        for i in inner(tree)
        for importing, imported in [i.rooms]
        if importing != imported and RANK.get(imported, 99) >= RANK.get(importing, -1)
    ]


def circles(tree: Tree) -> list[str]:
    """Rooms that import each other, directly or through others; the order plays no part."""
    graph = {}
    for importing, imported in tree.edges():
        graph.setdefault(importing, set()).add(imported)

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    circular = [name for name in sorted(graph) if name in reached(name)]
    return [f"{name} reaches itself: it imports {sorted(graph[name])}" for name in circular]


def past_the_door(tree: Tree) -> list[str]:
    """Imports from a module inside another room, instead of from the room or its public package."""
    return [
        f"{i.file}: {i.source} is inside {i.rooms[1]}"
        for i in [*inner(tree), *inner(tree, tree.outside)]
        if i.rooms[0] != i.rooms[1] and i.source.count(".") > 1 and i.source not in tree.exports
    ]


def not_exported(tree: Tree) -> list[str]:
    """Names that another room takes from a public package which does not export them."""
    return [
        f"{i.file}: {i.source} does not export {i.name}"
        for i in [*tree.imports, *tree.outside]
        if i.rooms[0] != i.rooms[1] and i.name and i.source in tree.exports
        if i.name not in tree.exports[i.source] and f"{i.source}.{i.name}" not in tree.exports
    ]


def missing(tree: Tree) -> list[str]:
    """Modules of opd_jax that are not there; a notebook or a script would fail only when it is run."""
    return [
        f"{i.file}: there is no {name}"
        for i in [*inner(tree), *inner(tree, tree.outside)]
        for name in [f"{PACKAGE}.{i.name}" if i.source == PACKAGE and i.name else i.source]
        if name not in {*tree.modules, f"{PACKAGE}.__version__"}
    ]


def forbidden(tree: Tree) -> list[str]:
    """Imports of what is built on opd_jax."""
    outside = {*OUTSIDE, "tests", "docs"}
    return [f"{i.file}: {i.source}" for i in tree.imports if i.source.split(".")[0] in outside]


def unused(tree: Tree, page: str) -> list[str]:
    """Exports that nothing outside the room uses, tests apart, and that the API page does not show."""
    used = {(i.source, i.name) for i in [*tree.imports, *tree.outside] if room(i.module) != room(i.source)}
    shown = {
        (source, name)
        for source, names in re.findall(r"^>>> from (\S+) import (.+)", page, re.MULTILINE)
        for name in names.split(", ")
    }
    for source, name in [*shown]:
        shown |= {(f"{source}.{name}", attribute) for attribute in re.findall(rf"\b{name}\.(\w+)", page)}
    for dotted in re.findall(r"^::: (\S+)", page, re.MULTILINE):  # ::: opd_jax.release.rules.rule
        *parts, name = dotted.split(".")
        shown |= {(".".join(parts[:length]), name) for length in range(2, len(parts) + 1)}
    return [
        f"{source} exports {name}"
        for source, names in sorted(tree.exports.items())
        for name in sorted(names)
        if (source, name) not in used | shown and f"{source}.{name}" not in tree.exports
    ]


def inner(tree: Tree, imports: list[Import] | None = None) -> Iterator[Import]:
    """Import statements that name opd_jax."""
    for found in tree.imports if imports is None else imports:
        if found.source.split(".")[0] == PACKAGE and not found.attribute:
            yield found


CHECKS = {
    "order": against_the_order,
    "circles": circles,
    "doors": past_the_door,
    "exports": not_exported,
    "missing": missing,
    "forbidden": forbidden,
    "unused": lambda tree: unused(tree, (ROOT / "docs/api.md").read_text()),
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_repository_keeps_the_order_of_its_rooms(repository, check):
    found = CHECKS[check](repository)
    assert not found, "\n".join(found)


def made_up(folder, **files: str) -> Tree:
    """A tree of opd_jax with two rooms, data over models, and further files: path without .py -> text."""
    lazy = "import lazy_loader\n"
    plain = {
        "opd_jax/__init__.py": "",
        "opd_jax/errors.py": "class UserError(ValueError): ...\n",
        "opd_jax/models/__init__.py": lazy,
        "opd_jax/models/__init__.pyi": "from . import rope\nfrom .config import ModelConfig\n",
        "opd_jax/models/config.py": "from opd_jax import errors\nfrom opd_jax.models import hidden\n",
        "opd_jax/models/rope.py": "",
        "opd_jax/models/hidden.py": "",
        "opd_jax/models/files/__init__.py": lazy,
        "opd_jax/models/files/__init__.pyi": "from .hf import load as load\n",
        "opd_jax/models/files/hf.py": "from opd_jax.models.config import ModelConfig\n",
        "opd_jax/data/__init__.py": "__all__ = ['render']\n",
        "opd_jax/data/__main__.py": "from opd_jax.data.batches import render\n",
        "opd_jax/data/batches.py": (
            "from opd_jax import models\nfrom opd_jax.models import ModelConfig\n"
            "from opd_jax.models.files import load\nmodels.rope\n"
        ),
        "studies/one.py": "from opd_jax.data import render\n",
    }
    for path, text in (plain | {f"{path}.py": text for path, text in files.items()}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return Tree(folder)


def test_a_tree_in_order_passes_every_check(tmp_path):
    tree = made_up(tmp_path)
    found = {name: check(tree) for name, check in CHECKS.items()}
    assert not any(found.values()), found
    assert tree.edges()["data", "models"] == 3 and tree.sizes["models"] == 4


BATCHES, STUDY = "opd_jax/data/batches.py", "studies/one.py"
ROPE, STUB = "opd_jax/models/rope.py", "opd_jax/models/__init__.pyi"


@pytest.mark.parametrize(
    "check, path, text, said",
    [
        ("order", ROPE, "from opd_jax.data import render", "models imports data"),
        ("order", ROPE, "def late():\n    import opd_jax.data", "models imports data"),
        ("order", ROPE, "from ..data import render", "models imports data"),
        ("order", BATCHES, "from opd_jax import release", "data imports release"),
        ("order", "opd_jax/attic.py", "from opd_jax import errors", "attic imports errors"),
        ("circles", ROPE, "from opd_jax.data import render", "models reaches itself"),
        ("doors", BATCHES, "from opd_jax.models.hidden import key", "opd_jax.models.hidden is inside models"),
        ("doors", BATCHES, "import opd_jax.models.rope", "opd_jax.models.rope is inside models"),
        ("doors", BATCHES, "from opd_jax.models.files.hf import load", "models.files.hf is inside models"),
        ("doors", STUDY, "from opd_jax.data.batches import render", "opd_jax.data.batches is inside data"),
        ("exports", BATCHES, "from opd_jax.models import hidden", "does not export hidden"),
        ("exports", BATCHES, "from opd_jax import models as m\nm.hidden", "does not export hidden"),
        ("exports", BATCHES, "from opd_jax.models.files import save", "does not export save"),
        ("exports", STUDY, "from opd_jax.data import batches", "does not export batches"),
        ("missing", STUDY, "from opd_jax import report_display", "no opd_jax.report_display"),
        ("missing", BATCHES, "from opd_jax.models.gone import key", "no opd_jax.models.gone"),
        ("forbidden", BATCHES, "from configs import default", "configs"),
        ("forbidden", BATCHES, "def late():\n    import studies.one", "studies.one"),
        ("forbidden", STUB, "from tests.tiny import STUDENT as STUDENT", "tests.tiny"),
        ("unused", STUDY, "", "opd_jax.data exports render"),
        ("unused", STUB, "from .hidden import key as key", "opd_jax.models exports key"),
    ],
)
def test_a_tree_out_of_order_fails_the_check(tmp_path, check, path, text, said):
    made_up(tmp_path)
    file = tmp_path / path
    file.write_text(text + "\n")
    found = CHECKS[check](Tree(tmp_path))
    assert any(said in line for line in found), found


def test_an_export_on_the_api_page_needs_no_user(tmp_path):
    made_up(tmp_path, **{"studies/one": ""})
    for page in (">>> from opd_jax.data import render\n", "::: opd_jax.data.batches.render\n"):
        assert unused(Tree(tmp_path), page) == []
    assert unused(Tree(tmp_path), "") == ["opd_jax.data exports render"]


def test_a_notebook_counts_as_a_script(tmp_path):
    code = ["%pip install x\n", "from opd_jax.data import batches\n", "if 1:\n", "    !ls"]
    (tmp_path / "colab").mkdir()
    cells = [{"cell_type": "code", "source": code}, {"cell_type": "markdown", "source": ["# from"]}]
    (tmp_path / "colab/one.ipynb").write_text(json.dumps({"cells": cells}))
    assert any("colab/one.ipynb" in line for line in not_exported(made_up(tmp_path)))


def test_the_order_names_every_room():
    assert set(Tree().sizes) - {PACKAGE} <= set(RANK)


def test_the_picture_of_the_rooms_is_what_the_imports_are(repository):
    drawn = (ROOT / "docs/images/rooms.svg").read_text(encoding="utf-8")
    assert drawn == picture(repository), "run: make map"
