"""Qwen3-30B-A3B teaches Qwen3-8B on 16 v5p chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper_8b.py --topology=v5p:2x2x4
    python -m opd_jax.train --config=configs/paper_8b.py --workdir=runs/paper_8b \
      --config.student.path=~/models/Qwen3-8B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Half of the rollouts are written at a time: the KV cache of all would fill the memory (docs/preflight.md).

Cost: at least 2.66 chip-hours a step with responses of full length, predicted by the roofline below. Most of
it is sampling, which reads the whole cache for each token. Preflight prints (jax 0.10.2, libtpu 0.0.42.1):

                            sample               train_step         evaluation
    arguments, GiB          1.91                 7.57               3.74
    temporaries, GiB        92.68                72.28              32.98
    resident, GiB           5.64                 0.00               3.82
    peak of capacity, GiB   89.76 of 95.74       61.56 of 95.74     29.77 of 95.74
    model TFLOPs            2.086e+04            9.652e+04          3.395e+04
    program TFLOPs          2.199e+04            1.216e+05          3.444e+04
    HBM traffic, GB         9.233e+05            8.532e+04          3.181e+04
    compute, s              47.9                 265                75
    HBM, s                  334                  30.9               11.5
    links, s                10.4                 41.1               15.7
    bound by                HBM                  compute            compute
    all-gather, GB          1.21e+03 (31227×)    1.85e+03 (18417×)  352 (10198×)
    all-reduce, GB          1.25e+03 (1167435×)  5.62e+03 (8804×)   2.5e+03 (3104×)
    all-to-all, GB          17.2 (15361×)        60.1 (64×)         25.8 (32×)
    collective-permute, GB  –                    575 (70720×)       –
    compile, s              79                   122                36

Predicted step: 599 s at full length, 1642 response tokens a second a chip.
"""

from opd_jax import config


def get_config():
    """The paper's recipe with a larger student."""
    c = config.load("paper")
    c.student.path = "preset:Qwen3-8B"
    c.rollout.slots = 512
    c.checkpoint.every = 2
    return c
