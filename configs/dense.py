"""Qwen3-32B teaches Qwen3-8B on 64 v5p chips, 512 rollouts of 8192 tokens a step.

    python -m opd_jax.preflight --config=configs/dense.py --topology=v5p:4x4x4
    python -m opd_jax.train --config=configs/dense.py --workdir=runs/dense \
      --config.student.path=~/models/Qwen3-8B --config.teacher.path=~/models/Qwen3-32B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 156 chip-hours for 100 steps, by the roofline below. Preflight's table (jax 0.10.2, libtpu
0.0.42.1; of train_step and evaluation read from the programs that the compiler had optimised and given their
memory, before it generated code):

                           sample          train_step      evaluation
    arguments, GiB         0.48            2.40            1.43
    temporaries, GiB       24.16           8.59            5.39
    held beside, GiB       1.91            0.00            0.96
    peak of capacity, GiB  25.94 of 95.74  10.99 of 95.74  7.78 of 95.74
    model TFLOPs           1140            8163            5883
    program TFLOPs         1264            9321            5928
    HBM traffic, GB        1.87e+05        7749            4539
    compute, s             2.75            20.3            12.9
    HBM, s                 67.6            2.8             1.64
    links, s               0.321           10              6.71
    bound by               HBM             compute         compute
    all-reduce, GB         29 (14614×)     916 (6116×)     613 (3725×)
    all-to-all, GB         0.537 (7169×)   1.74 (24×)      1.21 (16×)

Predicted step: 88 s at full length, 652 response tokens a second a chip. With attention.kernel=plain
train_step takes 23.1 s, bound by HBM, at a peak of 20.97 GiB, the step 91 s; micro-batches of up to 128 fit.
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
    c.rollout.cache_stages = 4
    c.mesh.tensor = 4  # a decode step reads a quarter of the weights
    c.scoring.chunk = 1024
    c.train.micro_batch = 64
    c.checkpoint.every = 20
    return c
