"""What a command shows while it works: a bar in a terminal, lines with the time left in a log.

In: phases and pieces of work as they begin and end. Out: text on standard error.
May import: errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
