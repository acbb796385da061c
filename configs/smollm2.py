"""A longer run of the demo's models: five blocks removed, longer responses, two objectives.

Teacher: SmolLM2-135M-Instruct. Student: the same model without blocks 4, 9, 14, 20 and 25. Both objectives
use the release rule and start from the same student, prompts and seeds. smollm2_teacher.py is the reference
that they are compared with. Results: docs/smollm2.md.

    make smollm2
    python -m opd_jax.sweep --config=configs/smollm2.py --out=runs/smollm2
"""

from ml_collections import ConfigDict

from opd_jax import config

SEEDS = (0,)
OBJECTIVES = ("policy_gradient", "reverse_kl")


def get_config():
    """The demo's models, prompts, batch and optimizer; about ten minutes an objective on two idle cores."""
    c = config.load("demo")
    c.student.drop_layers = (4, 9, 14, 20, 25)
    c.rollout.max_tokens = 160
    c.objective.name = OBJECTIVES[0]
    c.objective.end_weight = 0.0  # docs/smollm2.md shows how responses end without it
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4, 0  # as when the figures were made
    c.optimizer.learning_rate = 2e-4
    c.train.steps = 36
    c.eval.every = 12
    c.checkpoint.every = 12
    c.checkpoint.keep = 1
    c.metrics.rollouts_every = 1
    c.metrics.rollouts = 8  # the whole batch, for the release points
    c.metrics.tensorboard = False
    return c


def arms(config: ConfigDict) -> dict[str, dict]:
    """One arm for each objective; the first is the paper's."""
    return {name: {"objective.name": name} for name in OBJECTIVES}
