"""The report of one or several runs: an HTML page, and figures for notebooks and documents.

In: workdirs. Out: HTML and SVG.
May import: run and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
