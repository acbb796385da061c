"""The exception for mistakes of the user, how it ends a command, and parts of its messages."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

LONGEST = 500  # characters of a message; what a file holds may be longer


class UserError(ValueError):
    """A mistake in a config, a path or an input file.

    The message is one line: what is wrong, the config key or path, and the remedy. Commands print it and exit
    with status 2. It is raised before anything is compiled or written.

    Args:
      message: its white space becomes single spaces, and the middle of a long one is left out.
    """

    def __init__(self, message: Any):
        text = " ".join(str(message).split())
        if len(text) > LONGEST:
            text = f"{text[: LONGEST - 203]} … {text[-200:]}"
        super().__init__(text)


def fail(error: Any) -> NoReturn:
    """Prints one line and exits with status 2."""
    print(f"error: {UserError(error)}", file=sys.stderr)
    sys.exit(2)


def nearest(word: Any, words: Iterable[Any]) -> str:
    """A hint, " (did you mean X?)" with the nearest of `words`; "" if none is near."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the exception's name if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the caller names
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
