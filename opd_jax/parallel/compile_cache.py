"""Keeps compiled programs on disk, so that a restarted run does not compile again."""

import os
from pathlib import Path

import jax

from opd_jax.errors import UserError
from opd_jax.parallel import sharding


def enable(setting: str) -> str | None:
    """Turns JAX's persistent compilation cache on or off for this process; call before compiling.

    Args:
      setting: the config's compile.cache: a folder, "off", or "auto". Auto is $JAX_COMPILATION_CACHE_DIR if
        it is set; otherwise ~/.cache/opd_jax/compiled (or $XDG_CACHE_HOME/opd_jax/compiled) on TPU and GPU,
        and off on CPU.

    Returns:
      The folder, or None if the cache is off.

    Raises:
      UserError: the folder cannot be created.
    """
    if setting == "auto":
        # jax declares its settings at runtime, where pyright does not see them.
        named: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if named:
            return named
        sharding.all_devices()  # says so if there is none
        if jax.default_backend() == "cpu":
            return None
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(home).expanduser() / "opd_jax" / "compiled"
    elif setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    else:
        folder = Path(setting).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"compile.cache={setting}: cannot make {folder} ({error.strerror}); give another folder, or off"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return str(folder)
