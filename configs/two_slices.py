"""Qwen3-1.7B teaches Qwen3-0.6B on two slices of 4 v5e chips, 128 rollouts of 1024 tokens a step.

    python -m opd_jax.preflight --config=configs/two_slices.py --topology=2xv5e:2x2
    python -m opd_jax.train --config=configs/two_slices.py --workdir=runs/two_slices \
      --config.student.path=~/models/Qwen3-0.6B --config.teacher.path=~/models/Qwen3-1.7B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Each slice holds a copy of both models. The gradients of every micro-batch are summed over the two slices, in
bfloat16 and block by block, so a larger micro-batch crosses the network less often. After each decoded token
the slices agree whether any row is left: 768 messages of a few bytes, whose latency is not counted.

Cost: at least 0.7 chip-hours for 100 steps, predicted by the roofline below. Preflight prints (jax 0.10.2,
libtpu 0.0.42.1):

                           sample           train_step     evaluation
    arguments, GiB         0.56             2.20           1.36
    temporaries, GiB       3.52             3.49           2.15
    resident, GiB          1.63             0.00           0.83
    peak of capacity, GiB  5.30 of 15.75    5.09 of 15.75  4.35 of 15.75
    model TFLOPs           20.18            116.3          75.93
    program TFLOPs         20.57            138.9          77.85
    HBM traffic, GB        1995             426.7          204
    compute, s             0.104            0.705          0.395
    HBM, s                 2.44             0.521          0.249
    links, s               0.0176           0.319          0.132
    network, s             0.000126         0.69           3.69e-07
    bound by               HBM              compute        compute
    all-gather, GB         2.07 (394×)      21.1 (2373×)   15.7 (1578×)
    all-reduce, GB         0.00059 (1536×)  7.47 (143×)    –
    all-to-all, GB         0.0336 (769×)    0.134 (12×)    0.101 (8×)
    between slices, GB     0.000393 (768×)  2.16 (951×)    1.28e-06 (4×)
    reduce-scatter, GB     –                0.528 (336×)   –
    compile, s             64               116            28

Predicted step: 3.14 s at full length, 3912 response tokens a second a chip.
"""

from opd_jax import config


def get_config():
    """The models of one_chip.py with four times its rollouts; the data axis runs across the slices."""
    c = config.load("one_chip")
    c.mesh.preset = "slices"
    c.rollout.batch = 128
    c.train.micro_batch = 32
    return c
