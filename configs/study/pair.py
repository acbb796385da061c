"""The study of docs/study.md on the demo's pair of language models.

python -m opd_jax.sweep --config=configs/study/pair.py --out=runs/study/pair
"""

from opd_jax import config

arms = config.load_module("study/sorting").arms

SEEDS = (0, 1, 2)


def get_config():
    """Ten steps of the demo's run, evaluated before, halfway and after."""
    c = config.load("demo")
    c.objective.end_weight = 0.0  # so that only the rule differs from full supervision
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4, 0  # as when the figures were made
    c.train.steps = 10
    c.eval.every = 5
    c.checkpoint.every = 0
    c.metrics.rollouts = 8
    c.metrics.tensorboard = False
    return c
