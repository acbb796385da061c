"""Compiles a run for a TPU slice that is not attached, and says whether it fits and how long a step takes.

In: a config and a topology. Out: memory, FLOPs, traffic and predicted time of every program.
May import: run and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
