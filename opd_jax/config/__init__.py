"""Every field of a run, declared once with default, range and text; recipes, plugins, flags and their checks.

In: a recipe and --config.key=value. Out: a checked `ConfigDict`.
May import: distill, release, parallel and the rooms before them, for the names that a field allows.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
