"""configs/default.py as a page: every field with its default, its allowed values and its comment.

    python -m opd_jax.config.table > docs/configs.md
"""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from opd_jax.config import flags as config

DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"
HEAD = """\
# Every field of a config

Written by `python -m opd_jax.config.table > docs/configs.md` from `configs/default.py`: change that file
instead. On a command line a field is `--config.release.rule=none`; in a recipe, `c.release.rule = "none"`.
Unknown fields and values are refused before anything is compiled.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as the file has it: dotted key, source text of its default, lines of the comment above."""

    key: str
    default: str
    comment: list[str]


def fields(source: str) -> Iterator[Field]:
    """The fields of a config file's source, in order."""
    comment = []
    for line in map(str.strip, source.splitlines()):
        assigned = re.fullmatch(r"c\.([\w.]+) = (.+)", line)
        if line.startswith("#"):
            comment.append(line.removeprefix("#").removeprefix(" "))
        elif assigned and assigned[2] == "ConfigDict()":
            comment = []
        elif assigned and assigned[2].startswith("ConfigDict("):  # small groups that share a comment
            group = ast.literal_eval(assigned[2].removeprefix("ConfigDict(").removesuffix(")"))
            for name, value in group.items():
                yield Field(f"{assigned[1]}.{name}", json.dumps(value), comment)
            comment = []
        elif assigned:
            default, _, remark = assigned[2].partition("  # ")
            yield Field(assigned[1], default, [*comment, *filter(None, [remark])])
            comment = []
        else:
            comment = []


def allowed(key: str) -> str:
    """What config.validate accepts for a key, in words; "" where any value may do."""
    if key in config.ALLOWED:
        return "One of " + ", ".join(f"`{value}`" for value in config.ALLOWED[key]) + "."
    if key not in config.RANGES:
        return ""
    low, high = config.RANGES[key]
    return f"At least {low:g}." if high is None else f"From {low:g} to {high:g}."


def page(source: str) -> str:
    """The whole page as Markdown."""
    lines, group = [HEAD], "run"
    for field in fields(source):
        parent, dot, _ = field.key.partition(".")
        if dot and parent != group:
            group = parent
            lines.append(f"## {group}\n")
        lines += [f"### `{field.key}`\n", f"Default `{field.default}`. {allowed(field.key)}".rstrip() + "\n"]
        # What is indented in the comment is a list whose columns matter.
        for block in re.findall(r"(?:^ .*\n?)+|(?:^\S.*\n?)+", "\n".join(field.comment), re.MULTILINE):
            lines.append(f"```\n{block.rstrip()}\n```\n" if block.startswith(" ") else block.rstrip() + "\n")
    return "\n".join(lines)


def main() -> None:
    print(page(DEFAULT.read_text(encoding="utf-8")), end="")


if __name__ == "__main__":
    main()
