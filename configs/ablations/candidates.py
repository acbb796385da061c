"""Varies K, the number of the student's top tokens among which the teacher's margin is measured.

The paper's best value is 4.

    python -m opd_jax.sweep --config=configs/ablations/candidates.py --out=runs/candidates

Cost: 12 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """The paper's values, its best first."""
    return grid({"scoring.candidates": (4, 2, 16, 32)}, {"release.rule": "paper"})
