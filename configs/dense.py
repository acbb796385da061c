"""Qwen3-32B teaches Qwen3-8B on 64 v5p chips, 512 rollouts of 8192 tokens a step.

    python -m opd_jax.preflight --config=configs/dense.py --topology=v5p:4x4x4
    python -m opd_jax.train --config=configs/dense.py --workdir=runs/dense \
      --config.student.path=~/models/Qwen3-8B --config.teacher.path=~/models/Qwen3-32B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 161 chip-hours for 100 steps, by the roofline below. Preflight's table (jax 0.10.2, libtpu
0.0.42.1, attention.kernel=plain):

                           sample          train_step      evaluation
    arguments, GiB         0.48            2.40            1.43
    temporaries, GiB       24.16           19.55           21.71
    held beside, GiB       1.91            0.00            0.96
    peak of capacity, GiB  25.94 of 95.74  20.97 of 95.74  22.79 of 95.74
    model TFLOPs           1140            8163            5883
    program TFLOPs         1264            1.019e+04       6604
    HBM traffic, GB        1.87e+05        6.382e+04       3.835e+04
    compute, s             2.75            22.2            14.4
    HBM, s                 67.6            23.1            13.9
    links, s               0.321           10              6.71
    bound by               HBM             HBM             compute
    all-reduce, GB         29 (14614×)     916 (6116×)     613 (3725×)
    all-to-all, GB         0.537 (7169×)   1.74 (24×)      1.21 (16×)
    compile, s             118             172             55

Predicted step: 91 s at full length, 630 response tokens a second a chip; micro-batches of up to 128 fit.
"""

from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-8B"
    c.teacher.path = "preset:Qwen3-32B"
    c.rollout.batch = 512
    c.data.prompt_tokens = 1024
    c.rollout.max_tokens = 7168
    c.scoring.chunk = 1024
    c.train.micro_batch = 64
    return c
