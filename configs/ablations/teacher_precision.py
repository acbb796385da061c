"""Varies the dtype of the teacher's weights and activations, and stores the weights as int8.

The held-out KL of each arm is measured against its own teacher, so it cannot be compared across arms. Compare
the accuracy on a benchmark.

    python -m opd_jax.sweep --config=configs/ablations/teacher_precision.py --out=runs/teacher_precision

Cost: 12 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load
from opd_jax.sweep import grid

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """float32 first, with the release rule."""
    return grid(
        {"teacher.dtype": ("float32", "bfloat16"), "teacher.weights": ("float", "int8")},
        {"release.rule": "paper"},
    )
