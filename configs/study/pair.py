"""The study on the demo's pair of language models.

    python -m opd_jax.sweep --config=configs/study/pair.py --out=runs/study/pair
"""

from configs import demo
from configs.study.sorting import arms  # noqa: F401

SEEDS = (0, 1, 2)


def get_config():
    """The demo's runs; each evaluates before, between and after."""
    c = demo.get_config()
    c.eval.every = 12
    c.checkpoint.every = 0
    c.metrics.rollouts = 8
    c.metrics.tensorboard = False
    return c
