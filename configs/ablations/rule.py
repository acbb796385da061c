"""Varies which positions are supervised: all, the paper's release rule, its controls, and rival rules.

    python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/rule
    python -m opd_jax.sweep --config=configs/ablations/rule.py:configs/mine.py --out=runs/rule

Cost: 42 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.release import RULES

SEEDS = (0, 1, 2)
ARMS = {"none": "full", "paper": "release"}  # other arms have their rule's name


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Every rule. The fixed prefix keeps a share of each response; growing ones reach the length limit."""
    longest, steps = config.rollout.max_tokens, config.train.steps
    settings = {
        "prefix": {"prefix_fraction": 0.3},
        "popd": {"popd_steps": steps},
        "fopd": {"fopd_start": max(1, longest // 8), "fopd_end": longest, "fopd_steps": steps},
    }
    found = {}
    for rule in RULES:
        fields = {f"release.{name}": value for name, value in settings.get(rule, {}).items()}
        found[ARMS.get(rule, rule)] = {"release.rule": rule} | fields
    return found
