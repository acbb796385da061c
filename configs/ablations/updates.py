"""Varies the number of optimizer updates on each batch of rollouts.

With more than one update, the loss uses the clipped importance ratio.

    python -m opd_jax.sweep --config=configs/ablations/updates.py --out=runs/updates

Cost: 9 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Powers of two, with the release rule and the objective that uses the ratio."""
    fixed = {"release.rule": "paper", "objective.name": "policy_gradient"}
    return grid({"train.updates_per_rollout": (1, 2, 4)}, fixed)
