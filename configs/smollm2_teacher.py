"""The teacher of the longer run in its student's place, at a rate of 0: text that no student has spoilt.

    python -m opd_jax.train --config=configs/smollm2_teacher.py --workdir=runs/smollm2/teacher/seed-0
"""

from opd_jax import config


def get_config():
    """Three minutes on two cores; as many responses as a third of an objective's steps."""
    c = config.load("smollm2")
    c.student.drop_layers = ()
    c.optimizer.learning_rate = 0.0
    c.train.steps = 12
    c.eval.every = 0
    c.checkpoint.every = 12  # at the end, so that a finished run is known as one
    return c
