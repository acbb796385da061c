"""The documents say what the code does: fields, error messages, links, and commands that are run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from opd_jax.config import default
from opd_jax.config import table as config_table
from opd_jax.config.fields import fields
from opd_jax.declare import Field
from opd_jax.errors import UserError
from opd_jax.report import display as report_display
from opd_jax.run import run_record
from tests import tiny
from tests.report.test_report import rollout, train_line, write_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"^<!-- runnable -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_ERROR = re.compile(r'\b(?:fail "|echo "error: )((?:\$\([^)]*\)|[^"])*)"')
BLOCKS = {page: found for page in PAGES if (found := RUNNABLE.findall(page.read_text()))}


def messages():
    """(file, literal parts) of every UserError of the package whose text is written where it is made."""
    for path in sorted((ROOT / "opd_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"):
                continue
            text = node.args[0]
            if isinstance(text, ast.Constant):
                yield path.relative_to(ROOT), [text.value]
            elif isinstance(text, ast.JoinedStr):
                yield path.relative_to(ROOT), [v.value for v in text.values if isinstance(v, ast.Constant)]
    for path in sorted((ROOT / "launch").glob("*.sh")):
        for text in SHELL_ERROR.findall(path.read_text()):
            if text != "$*":  # how `fail` itself says what it was given
                yield path.relative_to(ROOT), re.split(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+", text)


def test_page_of_fields_is_up_to_date():
    page = config_table.page(fields())
    remedy = "run: python -m opd_jax.config.table > docs/configs.md"
    assert (ROOT / "docs/configs.md").read_text() == page, remedy


def test_page_of_fields_has_every_field_of_the_config():
    flat = {key for key, _ in run_record._leaves(default().to_dict())}
    page = (ROOT / "docs/configs.md").read_text()
    assert set(re.findall(r"^### `(.*)`$", page, re.MULTILINE)) == flat


def test_every_field_says_what_it_is():
    for key, field in fields().items():
        assert len(field.doc) > 20 and field.doc.rstrip().endswith((".", ")")), key


def test_page_has_default_range_words_reader_and_text_of_a_field():
    declared = {
        "x": Field(1, "Unit: tokens.", least=0),
        "y.a": Field(
            "",
            """First, on
        two lines.

        - one
          item
        - another""",
            allowed=lambda: ("a", "b"),
        ),
        "release.prefix_tokens": Field((0.5,), "Text.", least=1e-6, most=2),
    }
    assert (
        config_table.page(declared).removeprefix(config_table.HEAD)
        == """
### `x`

Default `1`. At least 0.

Unit: tokens.

## y

### `y.a`

Default `""`. One of `a`, `b`.

First, on two lines.

- one item
- another

## release

### `release.prefix_tokens`

Default `(0.5,)`. From 1e-06 to 2. Read only by `release.rule=prefix`.

Text.
"""
    )


def test_every_message_that_the_page_explains_exists():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`+)(.*?)\1 \| \S.* \|$", text, re.MULTILINE)
    quotes = [quote.replace("\\|", "|") for _, quote in rows]
    assert len(quotes) > 40 and all(len(quote.replace("…", "")) > 10 for quote in quotes)
    found = list(messages())
    assert len(found) > 50 and sum(path.suffix == ".sh" for path, _ in found) > 10
    known = ["…".join(parts) for _, parts in found]
    patterns = {quote: re.compile(".*".join(map(re.escape, quote.split("…")))) for quote in quotes}
    stale = [quote for quote, pattern in patterns.items() if not any(map(pattern.search, known))]
    assert not stale, "no such message; correct docs/troubleshooting.md:\n" + "\n".join(stale)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in re.findall(r"`((?:docs|configs|launch|colab|benchmarks)/[\w./-]+\.\w+)`", page.read_text()):
        if name not in ("launch/settings.sh", "configs/mine.py"):  # the reader's own
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {p.name for p in PAGES if p.name != "README.md"}
    assert "](../benchmarks/README.md)" in index


def test_the_readmes_python_example_weighs_the_tokens_before_the_drop():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {"tokenizer": tiny.tokenizer()}
    exec(compile(code, "README.md", "exec"), names)
    text = "".join(f"Sentence number {n} is here. " for n in range(8))
    tokens_BT = np.array([names["tokenizer"](text)["input_ids"]])
    late_BT = np.cumsum(tokens_BT == ord("."), axis=1) >= 3
    logp_BTK = np.where(late_BT[..., None], [-1.0, -1.1, -1.2], [-0.1, -3.0, -4.0])
    weight_BT = jax.jit(names["weights"])(logp_BTK, tokens_BT, np.ones(tokens_BT.shape, bool))
    np.testing.assert_array_equal(weight_BT > 0, np.arange(tokens_BT.shape[1])[None] < len(text) * 3 // 8)


# What the demo's recipe is at the size of a test; everything else of a block is the page's own.
SMALL = """

recipe = get_config


def get_config():
    c = recipe()
    c.student.path, c.student.drop_layers, c.teacher.path = "models/student", (), "models/teacher"
    c.data.heldout, c.train.steps, c.rollout.max_tokens, c.rollout.halvings = 4, 2, 12, 0
    return c
"""


@pytest.fixture
def desk(models, tmp_path):
    """A folder as a reader has it: the repository's files, two model folders and prompts with answers."""
    (tmp_path / "opd_jax").symlink_to(ROOT / "opd_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with open(tmp_path / "configs/demo.py", "a") as recipe:
        recipe.write(SMALL)
    shutil.copytree(models, tmp_path / "models")
    lines = [json.dumps({"prompt": f"What is {n} + {n * n}?", "answer": str(n + n * n)}) for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("page", sorted(BLOCKS, key=str), ids=lambda page: page.stem)
def test_runnable_blocks_of_a_page_run_one_after_another(desk, page):
    paths = {"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(desk / "cache")}
    for block in BLOCKS[page]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=desk,
            env=os.environ | paths,
            check=False,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stderr[-2000:]}"


def test_blocks_are_marked_runnable():
    assert {page.name for page in BLOCKS} >= {"quickstart.md", "how_it_works.md"}


def test_standalone_figure_has_fixed_colours_and_names_the_runs(tmp_path):
    rng = np.random.default_rng(0)
    lines = [train_line(step, rng, released=True) for step in range(1, 9)]
    runs = [run_record.read_run(write_run(tmp_path / n, lines), f"{n} <&>") for n in ("a", "b")]
    for draw in (
        report_display.divergence,
        report_display.margin,
        report_display.releases,
        report_display.times,
    ):
        svg = draw(runs)._repr_svg_()
        texts = {node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        assert {"a <&>", "b <&>"} <= texts
        assert "var(--" not in svg and "#1112" not in svg


def test_figure_of_what_was_not_recorded_says_so(tmp_path):
    run = run_record.read_run(write_run(tmp_path / "r", [{"kind": "train", "step": 1}]))
    assert "No KL was recorded" in report_display.divergence([run])


def test_transcript_tells_what_is_kept_and_what_is_not_finite():
    text = report_display.transcript([rollout(1)])
    assert text.splitlines()[2:] == [
        "kept      M  1.50  A  -0.25  One.",
        "released  M     –  A      –  Two.",
    ]


def test_clearest_rollout_is_the_release_of_most_evidence():
    plain, weak, strong = rollout(1, accepted=False), rollout(1) | {"gain": 1.0}, rollout(1) | {"gain": 7.0}
    assert report_display.clearest([weak, strong, plain]) is strong
    with pytest.raises(UserError, match="no rollout is recorded"):
        report_display.clearest([])
