"""Model folders and files: Hugging Face safetensors, GGUF, presets; sharded while they are read.

In: a path as `student.path` takes it. Out: (ModelConfig, parameters), or a folder that transformers reads.
May import: models, parallel and the rooms before them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
