"""A run: its programs, its folder, checkpoints, metrics, records, and all that is checked before it starts.

In: a config and a workdir. Out: a `Job`, and what a run leaves behind.
Which file: `programs` compiles; `job` reads models and data; `session` begins, saves and ends a run's folder;
`draw` turns prompts into rollouts; `resolve` settles the models' configs.
May import: config, evaluation and the rooms before them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
