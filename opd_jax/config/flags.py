"""The command line of an entry point: --config=FILE, and --config.key=value for any field."""

import itertools
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from opd_jax.config.recipes import PLUGINS, find, load
from opd_jax.errors import UserError, fail, nearest

DEFAULT = pathlib.Path(__file__).with_name("fields.py")


def run(main, *, config: str | None = None, without_file: bool = False):
    """Parses the command line and runs main(argv); a user's mistake ends in one line and status 2.

    Args:
      main: called with the remaining arguments once flags are parsed.
      config: default of --config=FILE, whose fields --config.key=value replaces.
      without_file: --config.key=value alone changes the default of every field.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
    default = str(find(config)) if config else None
    about = "A Python file with get_config(), or a recipe by its name."
    config_flags.DEFINE_config_file("config", default, about, lock_config=True)

    def parse(argv):
        given = _config_argument(argv)
        if not given and without_file and any(a.startswith("--config.") for a in argv):
            given = str(DEFAULT)
            argv = [argv[0], f"--config={given}", *argv[1:]]
        argv = _without_plugins(argv)
        path, *arguments = (given or default or "").split(":", 1)
        try:
            if given:
                argv = _with_file(argv, given, ":".join([str(find(path)), *arguments]))
            if path:
                known = _flat(load(path, *arguments))
                _check_fields(argv, known)
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, LookupError, OSError, ValueError, TypeError) as error:
            fail(error)

    def guarded(argv):
        if not any(a.startswith(("--verbosity", "-v")) for a in sys.argv):
            logging.set_verbosity(logging.WARNING)  # orbax and absl tell every step of a save
        try:
            main(argv)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.filename is None:
                raise
            fail(
                f"{error.filename}: {error.strerror or type(error).__name__}; restore access, or name another"
            )

    app.run(guarded, flags_parser=parse)


def _without_plugins(argv: list[str]) -> list[str]:
    """The words of a command without --config.plugins=FILES; every default config then has these files.

    Other words may set fields that the files declare, so they are imported before the words are parsed.
    """
    kept, words = [], iter(argv)
    for word in words:
        name, equals, files = word.partition("=")
        if name != "--config.plugins":
            kept.append(word)
            continue
        files = files if equals else next(words, "")
        named = (file.strip(" '\"") for file in files.strip("()[] ").split(","))
        PLUGINS.extend(file for file in named if file)
    return kept


def _config_argument(argv) -> str | None:
    """What --config=FILE[:ARGUMENT] or --config FILE[:ARGUMENT] names."""
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def _with_file(argv: list[str], given: str, file: str) -> list[str]:
    """The words of a command with the file in place of the recipe's name that --config gives."""
    joined = {f"{dash}config={given}": f"{dash}config={file}" for dash in ("--", "-")}
    before = ["", *argv]
    return [
        file if a == given and b in ("--config", "-config") else joined.get(a, a)
        for a, b in zip(argv, before)
    ]


def _check_fields(argv, known: list[str]):
    """Refuses the first --config.KEY that is not among the known keys."""
    for key in (a.partition("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")):
        if key.split("[")[0] not in known:
            raise UserError(f"--config.{key}: no such field{nearest(key, known)}; see docs/configs.md")


def _flat(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in config.items():
        keys += _flat(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return keys
