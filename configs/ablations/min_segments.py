"""Varies the least number of sentences in which the rule looks for a drop.

With 2 sentences any drop is accepted. The paper does not give a value.

    python -m opd_jax.sweep --config=configs/ablations/min_segments.py --out=runs/min_segments

Cost: 15 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """The default first."""
    return grid({"release.min_segments": (4, 2, 3, 6, 8)}, {"release.rule": "paper"})
