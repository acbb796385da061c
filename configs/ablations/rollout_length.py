"""The length limit of a response, by halves of the recipe's, with and without the release rule.

Held-out responses have the arm's own limit too, so read the accuracy of a benchmark whose answers fit into
the shortest one, rather than the KL, across lengths.

    python -m opd_jax.sweep --config=configs/ablations/rollout_length.py --out=runs/rollout_length

Cost: 18 runs of 1 to 3 minutes on two cores, on the demo's models (README.md).
"""

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config):
    """The whole length, a half, a quarter."""
    longest = config.rollout.max_tokens
    lengths = tuple(max(1, longest // part) for part in (1, 2, 4))
    return grid({"rollout.max_tokens": lengths, "release.rule": ("none", "paper")})
