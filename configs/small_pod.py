"""Qwen3-8B teaches Qwen3-1.7B on 16 v5e chips, 256 rollouts of 4096 tokens a step.

    python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4
    python -m opd_jax.train --config=configs/small_pod.py --workdir=runs/small_pod \
      --config.student.path=~/models/Qwen3-1.7B --config.teacher.path=~/models/Qwen3-8B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 26 chip-hours for 100 steps, by the roofline below. Chunks are long, since every chunk of the
loss sums the output matrix's gradient over the slice. Preflight's table (jax 0.10.2, libtpu 0.0.42.1; read
from the programs that the compiler had optimised and given their memory, before it generated code):

                            sample           train_step      evaluation
    arguments, GiB          0.40             2.17            1.36
    temporaries, GiB        10.57            2.92            3.32
    held beside, GiB        1.76             0.00            0.80
    peak of capacity, GiB   12.73 of 15.75   5.08 of 15.75   5.48 of 15.75
    model TFLOPs            251.2            1815            1312
    program TFLOPs          275.3            2087            1341
    HBM traffic, GB         3.944e+04        3337            1879
    compute, s              1.4              10.6            6.81
    HBM, s                  48.2             4.07            2.29
    links, s                0.0681           6.34            2.81
    bound by                HBM              compute         compute
    all-gather, GB          6.26 (394×)      333 (10353×)    269 (7186×)
    all-reduce, GB          0.00368 (7168×)  0.00391 (483×)  2.56e-06 (3×)
    all-to-all, GB          0.268 (3585×)    1.07 (48×)      0.805 (32×)
    collective-permute, GB  –                257 (105600×)   –

Predicted step: 59 s at full length, 976 response tokens a second a chip. With attention.kernel=plain
train_step takes 15.7 s, bound by HBM, at a peak of 6.11 GiB, the step 64 s; micro-batches of up to 64 fit.
"""

from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-1.7B"
    c.teacher.path = "preset:Qwen3-8B"
    c.rollout.batch = 256
    c.data.prompt_tokens = 512
    c.rollout.max_tokens = 3584
    c.rollout.cache_stages = 4
    c.mesh.tensor = 4  # a decode step reads a quarter of the weights
    c.scoring.chunk = 1024
    c.train.micro_batch = 16
    c.checkpoint.every = 20
    return c
