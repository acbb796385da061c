"""Trains the teacher of the sorting study on worked problems.

python -m studies.sorting --out=runs/sorting
python -m opd_jax.sft --config=configs/study/sorting_teacher.py --workdir=runs/sorting/teacher
"""

from opd_jax import config


def get_config():
    """Starts from random weights; takes some minutes on two cores."""
    c = config.default()
    c.student.path = "random:runs/sorting/shape"
    c.student.products = "compute"  # auto would depend on the machine
    c.data.source = "jsonl"
    c.data.path = "runs/sorting/worked.jsonl"
    c.data.prompt_tokens = 16
    c.data.heldout = 256
    c.rollout.batch = 64
    c.rollout.max_tokens = 84
    c.scoring.chunk = 84
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "cosine"
    c.optimizer.b2 = 0.98
    c.train.steps = 3000
    c.train.remat = "none"
    c.eval.every = 300
    c.checkpoint.every = 500
    c.metrics.tensorboard = False
    return c
