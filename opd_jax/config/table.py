"""docs/configs.md: every field with its default, its allowed values and its text.

python -m opd_jax.config.table > docs/configs.md
"""

import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from opd_jax.config.fields import fields, reader
from opd_jax.declare import Field

WIDTH = 110
HEAD = """\
# Every field of a config

After reading this page you know every field of a run: its default, its allowed values, its unit and its cost.

Set a field in a recipe with `c.release.rule = "none"`, or on the command line with
`--config.release.rule=none`. Unknown fields and values are refused before anything is compiled.

How values are written:

- **Off** is 0 for a number, `""` for a text and `()` for a list, and the field says so. There are three
  exceptions. `rollout.top_p` is off at 1. `teacher.end_id` is off at -1, because 0 is an id. `compile.cache`
  is off with the word `off`.
- **Chosen for you** is `auto` in a field of words or dtypes. Elsewhere the empty value (0, `""` or `()`) may
  stand for a choice, such as the whole batch or the packaged word lists. The field says which.
- **A list** such as `("embedding",)` is `--config.train.frozen="('embedding',)"` on the command line.

This page is written by `python -m opd_jax.config.table > docs/configs.md`. To change it, edit where the field
is declared: in `opd_jax/config/sections/`, or next to the code of the rule or objective that reads it.
"""


def written(value: Any) -> str:
    """A default as a recipe writes it."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def allowed(field: Field) -> str:
    """The values that `Field.check` accepts, in words; "" if there is no limit."""
    if (choices := field.words()) is not None:
        return "One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    low, high = (None if x is None else written(x) for x in (field.least, field.most))
    if low is None and high is None:
        return ""
    if high is None:
        return f"At least {low}."
    return f"At most {high}." if low is None else f"From {low} to {high}."


def page(fields: Mapping[str, Field]) -> str:
    """The whole page as Markdown."""
    lines, group = [HEAD], "run"
    for key, field in fields.items():
        parent, dot, _ = key.partition(".")
        if dot and parent != group:
            group = parent
            lines.append(f"## {group}\n")
        of = reader(key)
        choice = {"release": "release.rule", "objective": "objective.name"}
        only = f"Read only by `{choice[of[0]]}={of[1]}`." if of else ""
        facts = [f"Default `{written(field.default)}`.", allowed(field), only]
        lines += [f"### `{key}`\n", _filled(" ".join(filter(None, facts))) + "\n"]
        for block in inspect.cleandoc(field.doc).split("\n\n"):
            items = re.split(r"\n(?=- )", block)
            lines.append("\n".join(map(_filled, items)) + "\n")
    return "\n".join(lines)


def _filled(text: str) -> str:
    """A paragraph, or an item of a list, in lines of the page's width."""
    indent = "  " if text.startswith("- ") else ""
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    print(page(fields()), end="")


if __name__ == "__main__":
    main()
