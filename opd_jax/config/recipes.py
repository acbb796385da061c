"""Recipes: Python files with get_config(), by their path or by a name such as demo or ablations/rule."""

import contextlib
import importlib.machinery
import pathlib
import traceback
import types
from collections.abc import Sequence

from ml_collections import ConfigDict

from opd_jax.errors import UserError, nearest

# Where recipes lie: in an installed package, and in a checkout.
RECIPES = tuple(pathlib.Path(__file__).parents[n] / name for n, name in ((1, "recipes"), (2, "configs")))
# The plugins that a command line, or `load`, adds to every default config that is made meanwhile.
PLUGINS: list[str] = []


def load(path: str, *arguments: str, plugins: Sequence[str] = ()) -> ConfigDict:
    """get_config(*arguments) of a Python file.

    Args:
      plugins: files for the field `plugins`, in addition to those that the recipe names.

    Raises:
      UserError: as `load_module`, or the file has no get_config, or that fails.
    """
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} has no get_config(); see configs/demo.py")
    before = list(PLUGINS)
    try:
        PLUGINS.extend(plugins)
        with _running(f"--config={path}"):
            return module.get_config(*arguments)
    finally:
        PLUGINS[:] = before


def find(path: str) -> pathlib.Path:
    """The file that a path, or the name of a recipe such as demo or ablations/rule, stands for.

    Raises:
      UserError: there is none.
    """
    named = (folder / f"{path}.py" for folder in RECIPES)
    for file in (pathlib.Path(path), *named):
        if file.is_file():
            return file
    known = sorted({file.stem for folder in RECIPES for file in folder.glob("*.py") if file.stem[0] != "_"})
    raise UserError(
        f"--config={path}: no such file or recipe{nearest(path, known)}; give a Python file, or one of "
        f"{', '.join(known)}"
    )


def load_module(path: str) -> types.ModuleType:
    """A Python file of configs, or a recipe by its name.

    Raises:
      UserError: there is no such file, or Python cannot run it.
    """
    path = str(find(path))
    return run_file(path, f"--config={path}")


def run_file(path: str, named: str) -> types.ModuleType:
    """The module of a Python file.

    Args:
      named: the setting that names the file, for the message.

    Raises:
      UserError: Python cannot run it.
    """
    loader = importlib.machinery.SourceFileLoader(pathlib.Path(path).stem, path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    with _running(named):
        loader.exec_module(module)
    return module


@contextlib.contextmanager
def _running(named: str):
    """Turns an exception of a user's file into one line that says where it was raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else place[:2]
        raise UserError(
            f"{named} cannot be run ({type(error).__name__}: {error}, {file}:{line}); fix it"
        ) from error
