"""Varies the loss-mass rescale of each rule that leaves tokens out or weights them.

A rule and its rescale both change the loss. This separates the two effects.

    python -m opd_jax.sweep --config=configs/ablations/rescale.py --out=runs/rescale

Cost: 120 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax import config
from opd_jax.config import load
from opd_jax.release import RESCALES

rule = config.load_module("ablations/rule")

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Each arm of rule.py with each rescale; full supervision once, since it has nothing to rescale."""
    known = rule.arms(config)
    found = {"full": known.pop("full")}
    for name, overrides in known.items():
        for rescale in RESCALES:
            found[f"{name}+rescale={rescale}"] = overrides | {"release.rescale": rescale}
    return found
