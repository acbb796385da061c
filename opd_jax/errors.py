"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """A mistake in a config, a path or an input file.

    The message is one line: what is wrong, the config key or path, and the remedy. Entry points print
    it and exit with status 2; nothing has been compiled or written when it is raised.
    """
