"""Qwen3-1.7B teaches Qwen3-0.6B on one v5e chip (16 GB), 32 rollouts of 1024 tokens a step.

    python -m opd_jax.preflight --config=configs/one_chip.py --topology=v5e:1x1
    python -m opd_jax.train --config=configs/one_chip.py --workdir=runs/one_chip \
      --config.student.path=~/models/Qwen3-0.6B --config.teacher.path=~/models/Qwen3-1.7B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Adam's first moment is bfloat16; in float32, micro-batches of 2 would fill the memory. docs/preflight.md says
what fits with optimizer.memory=host.

Cost: at least 0.14 chip-hours for 100 steps, predicted by the roofline below. Preflight prints (jax 0.10.2,
libtpu 0.0.42.1):

                           sample          train_step      evaluation
    arguments, GiB         2.22            8.76            5.43
    temporaries, GiB       6.09            8.09            2.44
    resident, GiB          6.54            0.00            3.33
    peak of capacity, GiB  13.60 of 15.75  14.58 of 15.75  11.20 of 15.75
    model TFLOPs           40.36           232.6           151.9
    program TFLOPs         41.15           277.8           155.7
    HBM traffic, GB        3072            889.2           408
    compute, s             0.209           1.41            0.79
    HBM, s                 3.75            1.09            0.498
    links, s               0               0               0
    bound by               HBM             compute         compute
    compile, s             49              33              14

Predicted step: 5.16 s at full length, 4762 response tokens a second; micro-batches of up to 8 fit.
"""

from opd_jax import config


def get_config():
    """The default config with the models and sizes of this recipe."""
    c = config.default()
    c.student.path = "preset:Qwen3-0.6B"
    c.teacher.path = "preset:Qwen3-1.7B"
    c.rollout.batch = 32
    c.rollout.max_tokens = 768
    c.data.prompt_tokens = 256
    c.optimizer.mu_dtype = "bfloat16"
    c.train.micro_batch = 4
    return c
