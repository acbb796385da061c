"""Qwen3-1.7B teaches Qwen3-0.6B on two slices of 4 v5e chips, 128 rollouts of 1024 tokens a step.

    python -m opd_jax.preflight --config=configs/two_slices.py --topology=2xv5e:2x2
    python -m opd_jax.train --config=configs/two_slices.py --workdir=runs/two_slices \\
      --config.student.path=~/models/Qwen3-0.6B --config.teacher.path=~/models/Qwen3-1.7B \\
      --config.data.source=jsonl --config.data.path=prompts.jsonl

A slice holds a copy of both models, and the gradients are summed over the two: preflight's "between slices"
says how often, and "network" what that takes. The whole recipe has not been compiled yet; a step of two tiny
models has, for the same slices (tests/test_tpu.py).
"""

from configs import one_chip


def get_config():
    """The pair of one_chip.py with four times its rollouts, data across the slices."""
    c = one_chip.get_config()
    c.mesh.preset = "slices"
    c.rollout.batch = 128
    c.train.micro_batch = 32
    return c
