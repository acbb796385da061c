"""The default config, made of the declared fields: those of sections/, of rules, of objectives, of plugins.

A recipe's get_config() starts from `default()` and changes what it needs. On the command line, any field can
be changed: --config.release.rule=none. Unknown fields and values are refused. docs/configs.md lists them all.
"""

import importlib
import itertools
from collections.abc import Iterable

from ml_collections import ConfigDict

from opd_jax.config import plugins as plugin_files
from opd_jax.config.recipes import PLUGINS
from opd_jax.config.sections import data, machine, method, models
from opd_jax.declare import PARAMETERS, Field
from opd_jax.errors import UserError

FIELDS = models.FIELDS | data.FIELDS | method.FIELDS | machine.FIELDS
# Modules whose rules and objectives declare fields of their own.
DECLARING = ("opd_jax.release.rules", "opd_jax.distill.objectives")


def fields(plugins: Iterable[str] = ()) -> dict[str, Field]:
    """Every field by its dotted name; in a section, those of single rules and objectives come last.

    Args:
      plugins: files to import first, for the fields that they declare.

    Raises:
      UserError: a file cannot be imported, or declares a field that is there already.
    """
    for module in DECLARING:
        importlib.import_module(module)
    plugin_files.load(plugins)
    hidden = plugin_files.declared_by_others(plugins)
    found = {}
    for section, own in itertools.groupby(FIELDS, key=lambda key: key.partition(".")[0]):
        found |= {key: FIELDS[key] for key in own}
        for (where, name), declared in PARAMETERS.items():
            if where != section or (where, name) in hidden:
                continue
            for field in declared:
                if f"{section}.{field}" in FIELDS:
                    raise UserError(f"{section}.{field} of {name} is a field of every run; rename {name}'s")
            found |= {f"{section}.{field}": declared[field] for field in declared}
    return found


def reader(key: str) -> tuple[str, str] | None:
    """(section, name) of the one rule or objective that reads a field; None where more may."""
    section, _, field = key.partition(".")
    return next((known for known, own in PARAMETERS.items() if known[0] == section and field in own), None)


def default(plugins: Iterable[str] = ()) -> ConfigDict:
    """The default of every field; student.path and teacher.path have none and must be set.

    Args:
      plugins: Python files that register rules or objectives of your own. Their fields are in the config too.

    Raises:
      UserError: as `fields`.
    """
    files = tuple(dict.fromkeys((*PLUGINS, *plugin_files.listed(plugins))))
    config = ConfigDict()
    for key, field in fields(files).items():
        *sections, name = key.split(".")
        place = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[name] = field.default
    config.plugins = files
    return config


def get(config: ConfigDict, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


get_config = default  # as a recipe has it
