"""The one exception a user's mistake raises, how a command ends by it, and what such messages are made of."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake in a config, a path or an input file.

    The message is one line: what is wrong, the config key or path, and the remedy. Entry points print
    it and exit with status 2; nothing has been compiled or written when it is raised.
    """


def fail(error: Any) -> NoReturn:
    """Prints one line and exits with status 2."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def nearest(word: Any, words: Iterable[Any]) -> str:
    """A parenthesis that names the nearest of `words`, or nothing where none is near."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: BaseException) -> str:
    """The first line of what a library says, or the exception's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
