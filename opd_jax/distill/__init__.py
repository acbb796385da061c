"""The method: sample, score, release, loss, update.

In: both models' parameters and a batch of prompts. Out: `Rollouts`, `Scores`, and the next `TrainState`.
Which file: `rollout` samples, and owns the loop in which rows end; `scoring` has the teacher read them;
`packing` lays rows behind each other for it and for the gradient; `train_step` scores, releases, updates in
one program; `loss` and `objectives` hold the formulas; `trainable` says which parameters change; `types` what
flows between them.
Pure functions of pytrees; they know no file, no folder and no mesh beyond the sharding of their arguments.
May import: release, models and the rooms before them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
