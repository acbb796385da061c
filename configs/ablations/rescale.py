"""The loss-mass rescale, with each truncating rule: it is a confounder of its own.

    python -m opd_jax.sweep --config=configs/ablations/rescale.py --out=runs/rescale
"""

from opd_jax.arms import grid
from opd_jax.config import load
from opd_jax.release import RESCALES

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config):
    """Rules by rescale, and full supervision, which has nothing to rescale."""
    cut = grid({"release.rule": ("paper", "prefix", "shuffled"), "release.rescale": RESCALES})
    return {"full": {"release.rule": "none"}} | cut
