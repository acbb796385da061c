"""Fewest sentences in which a drop is looked for; at 2 any drop fires. The paper leaves it open.

    python -m opd_jax.sweep --config=configs/ablations/min_segments.py --out=runs/min_segments

Cost: 15 runs of about 3 minutes on two cores, on the demo's models (README.md).
"""

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config):
    """The default first."""
    return grid({"release.min_segments": (4, 2, 3, 6, 8)}, {"release.rule": "paper"})
