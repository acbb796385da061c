"""Where prompts come from: files, data sets, generators, and the demo's own.

In: a source's name and path. Out: `Conversation`s: messages and, if known, the reference answer.
May import: models and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
