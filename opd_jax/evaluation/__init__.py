"""How good a student is: distance to its teacher, accuracy on benchmarks, intervals, paired comparison.

In: something that samples, prompts, reference answers. Out: results as dicts, and rows, one a prompt.
May import: distill, data and the rooms before them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
