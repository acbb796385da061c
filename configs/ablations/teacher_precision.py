"""Dtype of the teacher's weights and activations, and int8 weights.

The held-out KL of each arm is to its own teacher: read the accuracy of a benchmark, rather, across arms.

    python -m opd_jax.sweep --config=configs/ablations/teacher_precision.py --out=runs/teacher_precision

Cost: 12 runs of about 3 minutes on two cores, on the demo's models (README.md).
"""

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config):
    """float32 first, with the release rule."""
    return grid(
        {"teacher.dtype": ("float32", "bfloat16"), "teacher.weights": ("float", "int8")},
        {"release.rule": "paper"},
    )
