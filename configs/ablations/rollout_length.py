"""Varies the length limit of a response, with and without the release rule.

The held-out responses have the arm's own limit too, so the KL cannot be compared across lengths. Compare the
accuracy on a benchmark whose answers fit into the shortest limit.

    python -m opd_jax.sweep --config=configs/ablations/rollout_length.py --out=runs/rollout_length

Cost: 18 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """The recipe's limit, a half of it, a quarter."""
    longest = config.rollout.max_tokens
    lengths = tuple(max(1, longest // part) for part in (1, 2, 4))
    return grid({"rollout.max_tokens": lengths, "release.rule": ("none", "paper")})
