"""The notebooks run from top to bottom, with small parameters; the committed outputs are of a real run."""

import ast
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from opd_jax.errors import UserError
from opd_jax.preflight import notebook as notebooks

ROOT = Path(__file__).parents[2]


def read(name: str):
    notebook = nbformat.read(ROOT / "colab" / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parameters(notebook):
    """The cell that a user edits."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def executed(name: str, root=ROOT, **values) -> str:
    """Runs the notebook with some parameters replaced, as a user would edit them; returns what it printed.

    A cell that raises fails the test. `root` is the folder of opd_jax/, configs/ and colab/.
    """
    notebook = read(name)
    cell = parameters(notebook)
    names = {line.partition(" = ")[0] for line in cell.source.splitlines()}
    assert set(values) <= names
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
    client = NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(root / "colab")}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 5
    return "".join(output.text for output in outputs if output.output_type == "stream")


# The demo's recipe with two of the student's blocks: its sampler has a program for each, compiled one by one.
TWO_BLOCKS = """

recipe = get_config


def get_config():
    c = recipe()
    c.student.drop_layers, c.rollout.halvings = tuple(range(1, 29)), 0
    return c
"""


def test_demo_notebook_runs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("XLA_FLAGS", "")  # a real model runs longer than LLVM takes to optimise its programs
    (tmp_path / "colab").mkdir()
    (tmp_path / "opd_jax").symlink_to(ROOT / "opd_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with open(tmp_path / "configs/demo.py", "a") as recipe:
        recipe.write(TWO_BLOCKS)
    printed = executed("demo.ipynb", tmp_path, STEPS=2, BATCH=2, TOKENS=16, HELDOUT=2, LONG=24, OUT=str(out))
    assert "held-out KL(student‖teacher)" in printed and "release.rule=paper" in printed
    assert (out / "report.html").stat().st_size > 50_000


def test_qwen3_notebook_runs_on_a_tiny_pair(models, tmp_path):
    sizes = {
        "data.prompt_tokens": 48,
        "data.heldout": 4,
        "rollout.batch": 4,
        "rollout.max_tokens": 12,
        "scoring.chunk": 8,
        "train.micro_batch": 2,
        "metrics.tensorboard": False,
    }
    printed = executed(
        "qwen3.ipynb",
        STUDENT=str(models / "student"),
        TEACHER=str(models / "teacher"),
        STEPS=2,
        PROMPTS=str(models / "prompts.jsonl"),
        OUT=str(tmp_path / "run"),
        OVERRIDES=sizes,
        TOPOLOGY="",
        LOGIN=False,
    )
    assert "20 training prompts, 4 held out" in printed
    assert (tmp_path / "run" / "report.html").exists()


class Shell:
    """What IPython offers a cell: !commands run, magics such as %pip are noted."""

    def __init__(self):
        self.magics = []

    def system(self, command):
        subprocess.run(command, shell=True, check=False)

    def run_line_magic(self, name, arguments):
        self.magics.append(name)


def install(name: str, repository: str) -> list[str]:
    """Runs the install cell; returns the magics it used."""
    (cell,) = (cell for cell in read(name).cells if "git clone" in cell.source)
    shell, values = Shell(), {"REPOSITORY": repository, "EXTRAS": "demo"}
    source = cell.source.replace("{REPOSITORY}", repository).replace("{EXTRAS}", "demo")
    exec(TransformerManager().transform_cell(source), values | {"get_ipython": lambda: shell})
    return shell.magics


@pytest.mark.parametrize("name", ["demo.ipynb", "qwen3.ipynb"])
def test_a_notebook_alone_on_a_machine_clones_the_repository_or_says_what_to_fill_in(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nothing is installed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^REPOSITORY is empty: set it in the first cell to the git"):
        install(name, "")
    with pytest.raises(SystemExit, match="^REPOSITORY = '/nowhere' holds no opd_jax: set it"):
        install(name, "/nowhere")
    origin = tmp_path / "my origin"
    (origin / "configs").mkdir(parents=True)
    (origin / "configs" / "demo.py").touch()
    (origin / "setup.py").touch()
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    assert "pip" in install(name, str(origin))
    assert Path.cwd() == tmp_path / "opd_jax"
    install(name, str(origin))  # once more, as after a restart
    assert Path.cwd() == tmp_path / "opd_jax"


@pytest.mark.parametrize("name", ["demo.ipynb", "qwen3.ipynb"])
def test_notebook_is_plain(name):
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not logic(cell.source), cell.source


LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try, ast.With)


def logic(source: str) -> list[str]:
    """What of a cell belongs into the library: definitions, branches and loops that do more than show.

    A loop of prints is display; a branch of one call is a switch. The install cell runs before there is a
    library, and is tested by itself.
    """
    if "git clone" in source:
        return []
    found = []
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        plain = not isinstance(node, LOGIC)
        if isinstance(node, ast.For):
            plain = all(ast.unparse(line).startswith("print(") for line in node.body)
        if isinstance(node, ast.If):
            plain = not node.orelse and len(node.body) == 1 and isinstance(node.body[0], ast.Expr)
        if not plain:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "if a:\n    def f():\n        pass",
        "for x in y:\n    total = total + x",
        "if a:\n    b = 1\nelse:\n    b = 2",
        "f = lambda x: x",
        "with open(a) as f:\n    f.read()",
    ],
)
def test_logic_in_a_cell_is_found_at_any_depth(source):
    assert logic(source)


def test_plain_cells_have_no_logic():
    assert not logic("x = f(1)\nif LOGIN:\n    login()\nfor a, b in c:\n    print(a, b)")


def test_preflight_compiles_the_notebooks_own_settings_and_its_refusal_ends_the_notebook(
    models, monkeypatch, capsys
):
    changes = notebooks.settings(7, "", {"rollout.batch": 8, "train.frozen": ("embedding",)})
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, stdout="the table")

    monkeypatch.setattr(notebooks.subprocess, "run", run)
    arguments = "configs/one_chip.py", "Qwen/Qwen3-0.6B", str(models / "teacher"), changes
    notebooks.preflight(*arguments, "v5e:1x1")
    assert "the table" in capsys.readouterr().out
    assert set(commands[0][3:]) == {
        "--config=configs/one_chip.py",
        "--topology=v5e:1x1",
        "--config.student.path=preset:Qwen3-0.6B",
        f"--config.teacher.path={models / 'teacher'}",
        "--config.data.source=demo",
        "--config.data.path=",
        "--config.data.over_long=drop",
        "--config.train.steps=7",
        "--config.rollout.batch=8",
        "--config.train.frozen=('embedding',)",
    }
    with pytest.raises(UserError, match="preflight for v5e:1x1 ended with status 1"):
        notebooks.preflight(*arguments, "v5e:1x1")
    notebooks.preflight(*arguments, "")
    assert len(commands) == 2


def test_a_notebooks_overrides_that_are_no_fields_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert notebooks.config("configs/one_chip.py", {"train.steps": 3}).train.steps == 3
    for wrong in ({"train.step": 3}, {"train.steps": "three"}):
        with pytest.raises(UserError, match=r"train.step.*does not fit"):
            notebooks.config("configs/one_chip.py", wrong)


def test_demo_notebook_was_committed_with_the_outputs_of_one_run():
    path = ROOT / "colab/demo.ipynb"
    assert path.stat().st_size < 1_000_000
    code = [cell for cell in read("demo.ipynb").cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 6
    assert not [output for output in outputs if output.output_type == "error"]
    assert os.sep + "site-packages" not in path.read_text()
