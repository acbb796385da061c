"""Qwen3-32B teaches Qwen3-8B on 64 v5p chips, 512 rollouts of 8192 tokens a step.

    python -m opd_jax.preflight --config=configs/dense.py --topology=v5p:4x4x4
    python -m opd_jax.train --config=configs/dense.py --workdir=runs/dense \
      --config.student.path=~/models/Qwen3-8B --config.teacher.path=~/models/Qwen3-32B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 85.2 chip-hours for 100 steps, predicted by the roofline below. Preflight prints (jax 0.10.2,
libtpu 0.0.42.1):

                            sample          train_step      evaluation
    arguments, GiB          0.48            2.40            1.43
    temporaries, GiB        13.71           16.20           3.41
    resident, GiB           1.91            0.00            0.96
    peak of capacity, GiB   15.25 of 95.74  15.18 of 95.74  5.70 of 95.74
    model TFLOPs            1140            8163            5883
    program TFLOPs          1173            9321            5928
    HBM traffic, GB         7.622e+04       6177            3556
    compute, s              2.56            20.3            12.9
    HBM, s                  27.6            2.23            1.29
    links, s                1.94            7.85            5.02
    bound by                HBM             compute         compute
    all-gather, GB          147 (7675×)     184 (7641×)     153 (5610×)
    all-reduce, GB          157 (552011×)   737 (3068×)     503 (1787×)
    all-to-all, GB          2.15 (7169×)    6.98 (24×)      4.83 (16×)
    collective-permute, GB  –               129 (68376×)    –
    compile, s              95              96              27

Predicted step: 47.9 s at full length, 1198 response tokens a second a chip.
"""

from opd_jax import config


def get_config():
    """The default config with the models and sizes of this recipe."""
    c = config.default()
    c.student.path = "preset:Qwen3-8B"
    c.teacher.path = "preset:Qwen3-32B"
    c.rollout.batch = 512
    c.data.prompt_tokens = 1024
    c.rollout.max_tokens = 7168
    c.rollout.halvings = 2  # hours of ragged responses earn back the compile time
    c.mesh.tensor = 4  # a decode step reads a quarter of the weights
    c.scoring.chunk = 1024
    c.train.micro_batch = 64
    c.checkpoint.every = 20
    return c
