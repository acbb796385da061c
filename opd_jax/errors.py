"""The exception for mistakes of the user, how it ends a command, and parts of its messages."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake in a config, a path or an input file.

    The message is one line: what is wrong, the config key or path, and the remedy. Commands print it and exit
    with status 2. It is raised before anything is compiled or written.
    """


def fail(error: Any) -> NoReturn:
    """Prints one line and exits with status 2."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def nearest(word: Any, words: Iterable[Any]) -> str:
    """A hint, " (did you mean X?)" with the nearest of `words`; "" if none is near."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the exception's name if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
