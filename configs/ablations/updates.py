"""Optimizer updates on each rollout batch; more than one uses the clipped importance ratio.

    python -m opd_jax.sweep --config=configs/ablations/updates.py --out=runs/updates

Cost: 9 runs of 3 to 8 minutes on two cores, on the demo's models (README.md).
"""

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config):
    """Powers of two, with the release rule and the objective that reads the ratio."""
    fixed = {"release.rule": "paper", "objective.name": "policy_gradient"}
    return grid({"train.updates_per_rollout": (1, 2, 4)}, fixed)
