"""Several arms and seeds of one recipe in one process, and the table that compares them.

In: an ablation's file. Out: a workdir for each arm and seed, and their table.
May import: every other room and the entries.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
