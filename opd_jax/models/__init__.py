"""Language models: one Flax NNX transformer for the supported families, its KV cache, and tokenizers.

In: a `ModelConfig`, parameters, tokens. Out: logits, hidden states, caches.
Which file: `transformer` declares the parameters and computes a block; `config` holds sizes and switches;
`attention` and `splash` say what a token sees; `cache` is prefill and the decode step; `moe` the experts.
`models.files` reads and writes them.
May import: parallel and the rooms before it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
