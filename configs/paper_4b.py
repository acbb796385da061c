"""Qwen3-30B-A3B teaches Qwen3-4B on 16 v5p chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper_4b.py --topology=v5p:2x2x4
    python -m opd_jax.train --config=configs/paper_4b.py --workdir=runs/paper_4b \
      --config.student.path=~/models/Qwen3-4B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 2.75 chip-hours a step with responses of full length, by the roofline below;
most of it is sampling, a read of the cache a token.

Preflight's table. Figures of jax 0.10.2 and libtpu 0.0.42.1, read from the programs that the compiler had
optimised and given their memory, before it generated code.

                            sample          train_step      evaluation
    arguments, GiB          0.47            2.39            1.45
    temporaries, GiB        46.11           13.38           7.22
    held beside, GiB        1.91            0.00            0.94
    peak of capacity, GiB   48.52 of 95.74  15.78 of 95.74  9.60 of 95.74
    model TFLOPs            6726            3.345e+04       1.327e+04
    program TFLOPs          7849            4.339e+04       1.35e+04
    HBM traffic, GB         5.94e+05        3.762e+04       1.549e+04
    compute, s              17.1            94.5            29.4
    HBM, s                  215             13.6            5.6
    links, s                0.0976          8.1             3.23
    bound by                HBM             compute         compute
    all-gather, GB          15.3 (506×)     833 (18289×)    596 (10194×)
    all-reduce, GB          0.063 (30720×)  0.0062 (611×)   9.22e-06 (3×)
    all-to-all, GB          2.68 (15361×)   10.2 (64×)      4.83 (32×)
    collective-permute, GB  –               641 (270400×)   –

Predicted step: 309 s at full length, 1589 response tokens a second a chip.
"""

from configs import paper


def get_config():
    """The paper's recipe with a larger student."""
    c = paper.get_config()
    c.student.path = "preset:Qwen3-4B"
    c.checkpoint.every = 2
    return c
