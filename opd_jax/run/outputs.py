"""Files and folders that a command line names to be written; one that cannot be ends in one line."""

import tempfile
from pathlib import Path

from opd_jax.errors import UserError


def write_text(out: str | Path, text: str) -> None:
    """Writes the file that --out names, in a folder made where it is missing.

    Decoded model text may hold lone surrogates, which UTF-8 has no form for; they are replaced.

    Raises:
      UserError: it cannot be written.
    """
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise unwritable(out, error) from error


def make_folder(out: str | Path, flag: str = "--out") -> None:
    """Makes the folder that a flag names, and sees that it can be written to.

    Raises:
      UserError: it cannot.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise unwritable(out, error, flag) from error


def unwritable(out: str | Path, error: OSError, flag: str = "--out") -> UserError:
    """The error for a flag that names a path that cannot be written."""
    return UserError(f"{flag}={out} cannot be written ({error.strerror}); choose another folder")
