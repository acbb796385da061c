"""How a config field is declared: its default, its text and what it may be, in one place.

The fields that several parts of a run read are declared in `opd_jax.config`. A rule or an objective declares
the fields that it alone reads next to its code. The default config, its checks and docs/configs.md follow
from both.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from opd_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
      default: its value where nothing sets it. Other values must have its type.
      doc: what it is, its unit and what it costs, as Markdown.
      allowed: the words it may be, or a function that returns them; None is no limit.
      least, most: its range, both ends included; None is no limit.
      items: of a tuple, the type of its items; None is no limit.
    """

    default: Any
    doc: str
    allowed: Collection[str] | Callable[[], Collection[str]] | None = None
    least: float | None = None
    most: float | None = None
    items: type | None = None

    def words(self) -> Collection[str] | None:
        """The words it may be, or None."""
        return self.allowed() if callable(self.allowed) else self.allowed

    def check(self, key: str, value: Any) -> None:
        """Refuses a value.

        Raises:
          UserError: names the key, the value and what is allowed.
        """
        words = self.words()
        if words is not None and value not in words:
            raise UserError(
                f"{key}={value} is not known{nearest(value, words)}; use one of {', '.join(words)}"
            )
        if self.items is not None and not all(type(item) is self.items for item in value):
            what = {int: "whole numbers", str: "strings"}.get(self.items, self.items.__name__)
            raise UserError(f"{key}={value!r}: give {what}, with commas between them")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is no finite number; the default is {self.default}")
        low, high = self.least, self.most
        if (low is not None and value < low) or (high is not None and value > high):
            limits = f"between {low} and {high}"
            if low is None or high is None:
                limits = f"at least {low}" if high is None else f"at most {high}"
            raise UserError(f"{key}={value} is out of range; it must be {limits}")


def listed_in(module: str, name: str) -> Callable[[], Collection[str]]:
    """For `Field.allowed`: the keys of a table in a module, which is imported when they are asked for."""
    return lambda: getattr(importlib.import_module(module), name)


# (section, name of the rule or objective) -> the fields that it alone reads, by their name in the section.
PARAMETERS: dict[tuple[str, str], Mapping[str, Field]] = {}


def parameters(section: str, name: str, fields: Mapping[str, Field]) -> None:
    """Declares the fields that a rule (section "release") or an objective ("objective") alone reads.

    Raises:
      ValueError: another one has declared such a field, so that both would read it.
    """
    for (other_section, other), declared in PARAMETERS.items():
        twice = sorted(fields.keys() & declared.keys())
        if twice and other_section == section and other != name:
            raise ValueError(f"{section}.{twice[0]} of {name} is a field of {other} too; rename one of them")
    PARAMETERS[section, name] = dict(fields)
