"""Devices and processes: the mesh, shardings by logical axis, several hosts, the compilation cache.

In: mesh sizes and tables of axis rules. Out: `jax.sharding.Mesh`, `NamedSharding`s, arrays placed on them.
May import: errors, progress.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
