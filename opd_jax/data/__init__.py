"""Prompts: read, rendered by the chat template, held out, shuffled, batched for every process.

In: the `data` section of a config and a tokenizer. Out: `Prompts`, and `PromptBatch`es of host arrays.
May import: models and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
