"""Varies which positions are supervised: all, the paper's release rule, its controls, and rival rules.

    python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/rule
    python -m opd_jax.sweep --config=configs/ablations/rule.py:configs/mine.py --out=runs/rule

Cost: 33 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Rules by name. The fixed prefix keeps a share of each response; FOPD's grows to the length limit."""
    longest = config.rollout.max_tokens
    fopd = {"fopd_start": max(1, longest // 8), "fopd_end": longest, "fopd_steps": config.train.steps}
    return {
        "full": {"release.rule": "none"},
        "release": {"release.rule": "paper"},
        "prefix": {"release.rule": "prefix", "release.prefix_fraction": 0.3},
        "shuffled": {"release.rule": "shuffled"},
        "random": {"release.rule": "random"},
        "advantage_std": {"release.rule": "advantage_std"},
        "suffix": {"release.rule": "suffix"},
        "fopd": {"release.rule": "fopd"} | {f"release.{key}": value for key, value in fopd.items()},
        "iw_opd": {"release.rule": "iw_opd"},
        "prune_opd": {"release.rule": "prune_opd"},
        "ta_opd": {"release.rule": "ta_opd"},
    }
