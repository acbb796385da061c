"""Qwen3-30B-A3B teaches Qwen3-4B on 16 v5p chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper_4b.py --topology=v5p:2x2x4
    python -m opd_jax.train --config=configs/paper_4b.py --workdir=runs/paper_4b \
      --config.student.path=~/models/Qwen3-4B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Half of the rollouts are written at a time: the KV cache of all would fill the memory (docs/preflight.md).

Cost: at least 2.22 chip-hours a step with responses of full length, predicted by the roofline below. Most of
it is sampling, which reads the whole cache for each token. Preflight prints (jax 0.10.2, libtpu 0.0.42.1):

                            sample            train_step         evaluation
    arguments, GiB          0.94              4.66               2.77
    temporaries, GiB        88.28             47.45              33.46
    resident, GiB           3.70              0.00               1.87
    peak of capacity, GiB   84.04 of 95.74    41.05 of 95.74     26.98 of 95.74
    model TFLOPs            1.345e+04         6.69e+04           2.655e+04
    program TFLOPs          1.458e+04         8.679e+04          2.701e+04
    HBM traffic, GB         8.592e+05         7.185e+04          2.912e+04
    compute, s              31.8              189                58.8
    HBM, s                  311               26                 10.5
    links, s                7.76              29.7               12.8
    bound by                HBM               compute            compute
    all-gather, GB          1.2e+03 (31227×)  1.69e+03 (18417×)  298 (10198×)
    all-reduce, GB          784 (1167435×)    3.98e+03 (8676×)   2.03e+03 (3104×)
    all-to-all, GB          10.7 (15361×)     40.8 (64×)         19.3 (32×)
    collective-permute, GB  –                 335 (70720×)       –
    compile, s              132               169                58

Predicted step: 500 s at full length, 1967 response tokens a second a chip.
"""

from opd_jax import config


def get_config():
    """The paper's recipe with a larger student."""
    c = config.load("paper")
    c.student.path = "preset:Qwen3-4B"
    c.rollout.slots = 512
    c.checkpoint.every = 2
    return c
