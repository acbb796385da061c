"""Finds the sentences of token ids on the device, with tables built once from the tokenizer.

In: a tokenizer, then tokens and a mask. Out: the segment number of every response token.
May import: models and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
