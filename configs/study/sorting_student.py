"""Teaches the sorting study's student, two thirds as wide, by fewer of the same worked problems.

    python -m opd_jax.sft --config=configs/study/sorting_student.py --workdir=runs/sorting/student
"""

from configs.study import sorting_teacher


def get_config():
    """As the teacher's, ended where it still errs in most responses."""
    c = sorting_teacher.get_config()
    c.student.path = "random:runs/sorting/shapes/student"
    c.train.steps = 1200
    c.checkpoint.every = 100
    return c
