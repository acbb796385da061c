"""The method: sample, score, release, loss, update.

In: both models' parameters and a batch of prompts. Out: `Rollouts`, `Scores`, and the next `TrainState`.
Pure functions of pytrees; they know no file, no folder and no mesh beyond the sharding of their arguments.
May import: release, models and the rooms before them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
