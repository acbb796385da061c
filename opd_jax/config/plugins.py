"""Python files of the user that register rules or objectives; each process imports them once.

A file that has changed since, or whose rule another file has replaced, is imported again.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from opd_jax.config.recipes import run_file
from opd_jax.declare import PARAMETERS, Field
from opd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A file as it was imported: when it was changed last, and what it declared."""

    changed: int
    declared: Mapping[tuple[str, str], Mapping[str, Field]]

    def is_current(self, changed: int) -> bool:
        """Whether the file is still the same, and what it declared still stands."""
        return self.changed == changed and all(PARAMETERS.get(k) is v for k, v in self.declared.items())


_LOADED: dict[Path, Loaded] = {}


def listed(plugins: Iterable[str]) -> tuple[str, ...]:
    """The field `plugins` as a tuple: a single name is a list of one."""
    return (plugins,) if isinstance(plugins, str) else tuple(plugins)


def load(plugins: Iterable[str]) -> None:
    """Imports those of the files that are not imported yet.

    Raises:
      UserError: there is no such file, or Python cannot run it.
    """
    for name in listed(plugins):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"plugins={name}: no such file in {Path.cwd()}; give a Python file")
        changed, place = file.stat().st_mtime_ns, file.resolve()
        if place in _LOADED and _LOADED[place].is_current(changed):
            continue
        before = dict(PARAMETERS)
        run_file(str(place), f"plugins={name}")
        new = {known: own for known, own in PARAMETERS.items() if before.get(known) is not own}
        _LOADED[place] = Loaded(changed, new)


def declared_by_others(plugins: Iterable[str]) -> set[tuple[str, str]]:
    """(section, name) of the rules and objectives of imported files that are not among `plugins`."""
    named = {Path(name).resolve() for name in listed(plugins)}
    by_file = {file: set(loaded.declared) for file, loaded in _LOADED.items()}
    theirs = set().union(*(known for file, known in by_file.items() if file not in named))
    return theirs.difference(*(known for file, known in by_file.items() if file in named))
