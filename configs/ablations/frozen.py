"""Varies which of the student's parameters are frozen, under full supervision.

    python -m opd_jax.sweep --config=configs/ablations/frozen.py --out=runs/frozen

Cost: 9 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """Trained: everything; all but the embedding and the head tied to it; only the feed-forward layers."""
    attention = ("query", "key", "value", "output")
    choices = {"all": (), "blocks": ("embedding",), "feed_forward": ("embedding", *attention)}
    return {name: {"train.frozen": frozen, "release.rule": "none"} for name, frozen in choices.items()}
