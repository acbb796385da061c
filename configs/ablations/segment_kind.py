"""Varies what a segment is: the paper's sentences, lines, blocks of tokens, single tokens.

The kind nltk has no arm, since it finds the same sentences as punkt.

    python -m opd_jax.sweep --config=configs/ablations/segment_kind.py --out=runs/segment_kind

Cost: 18 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Sentences first; blocks are a sixth and a twelfth of the length limit."""
    kinds = {name: name for name in ("punkt", "punkt_untrained", "newline", "token")}
    for parts in (6, 12):
        kinds[f"block_{parts}th"] = f"fixed:{max(1, config.rollout.max_tokens // parts)}"
    return {name: {"segments.kind": kind, "release.rule": "paper"} for name, kind in kinds.items()}
