"""Reference for smollm2.py: the teacher itself writes the responses, in the student's place at a rate of 0.

python -m opd_jax.train --config=configs/smollm2_teacher.py --workdir=runs/smollm2/teacher/seed-0
"""

from opd_jax import config


def get_config():
    """Three minutes on two cores; as many responses as in a third of the steps of smollm2.py."""
    c = config.load("smollm2")
    c.student.drop_layers = ()
    c.optimizer.learning_rate = 0.0
    c.train.steps = 12
    c.eval.every = 0
    c.checkpoint.every = 12  # at the end; this marks the run as finished
    return c
