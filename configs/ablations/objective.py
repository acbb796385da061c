"""Varies the objective that the student minimises at each position, under full supervision.

    python -m opd_jax.sweep --config=configs/ablations/objective.py --out=runs/objective

Cost: 21 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.distill import objectives
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Every objective, the sampled-token policy gradient first."""
    names = sorted(objectives.OBJECTIVES, key=lambda name: name != "policy_gradient")
    return grid({"objective.name": names}, {"release.rule": "none"})
