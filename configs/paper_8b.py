"""Qwen3-30B-A3B teaches Qwen3-8B on 16 v5p chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper_8b.py --topology=v5p:2x2x4
    python -m opd_jax.train --config=configs/paper_8b.py --workdir=runs/paper_8b \
      --config.student.path=~/models/Qwen3-8B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 3.5 chip-hours a step with responses of full length, by the roofline below;
most of it is sampling, a read of the cache a token.

Preflight's table. Figures of jax 0.10.2 and libtpu 0.0.42.1, read from the programs that the compiler had
optimised and given their memory, before it generated code.

                            sample          train_step         evaluation
    arguments, GiB          0.95            3.85               1.93
    temporaries, GiB        52.51           18.97              7.84
    held beside, GiB        2.88            0.00               1.91
    peak of capacity, GiB   56.38 of 95.74  22.84 of 95.74     11.68 of 95.74
    model TFLOPs            1.043e+04       4.826e+04          1.698e+04
    program TFLOPs          1.155e+04       6.078e+04          1.722e+04
    HBM traffic, GB         7.222e+05       4.536e+04          1.703e+04
    compute, s              25.2            132                37.5
    HBM, s                  261             16.4               6.16
    links, s                0.18            12.4               3.82
    bound by                HBM             compute            compute
    all-gather, GB          29 (506×)       1.15e+03 (18289×)  703 (10194×)
    all-reduce, GB          0.063 (30720×)  0.00975 (611×)     9.22e-06 (3×)
    all-to-all, GB          4.29 (15361×)   15 (64×)           6.44 (32×)
    collective-permute, GB  –               1.1e+03 (270400×)  –

Predicted step: 394 s at full length, 1249 response tokens a second a chip.
"""

from configs import paper


def get_config():
    """The paper's recipe with a larger student."""
    c = paper.get_config()
    c.student.path = "preset:Qwen3-8B"
    c.checkpoint.every = 2
    return c
