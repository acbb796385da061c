"""Qwen3-30B-A3B teaches Qwen3-1.7B on 64 v5p or v6e chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper.py --topology=v5p:4x4x4
    python -m opd_jax.preflight --config=configs/paper.py --topology=v6e:8x8
    python -m opd_jax.train --config=configs/paper.py --workdir=runs/paper \
      --config.student.path=~/models/Qwen3-1.7B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 1.93 (v5p) or 2.77 (v6e) chip-hours a step with responses of full length, by the
roofline below; most of it is sampling, a read of the cache a token. Keys, values and the teacher are
int8; rollout.cache_stages=4 would save an eighth of the sampler's time and compiles it twice as long.

Preflight's tables. Figures of jax 0.10.2 and libtpu 0.0.42.1, read from the programs that the compiler had
optimised and given their memory, before it generated code.

On v5p:4x4x4, a predicted step of 109 s, 2259 response tokens a second a chip:

                           sample          train_step     evaluation
    arguments, GiB         0.10            0.84           0.63
    temporaries, GiB       18.26           5.89           4.81
    held beside, GiB       0.73            0.00           0.20
    peak of capacity, GiB  19.10 of 95.74  6.74 of 95.74  5.65 of 95.74
    model TFLOPs           1384            8811           4658
    program TFLOPs         1603            1.08e+04       4746
    HBM traffic, GB        2.358e+05       1.372e+04      7116
    compute, s             3.49            23.5           10.3
    HBM, s                 85.3            4.96           2.57
    links, s               0.0751          8.17           5.75
    bound by               HBM             compute        compute
    all-reduce, GB         6.33 (30773×)   745 (5844×)    525 (4309×)
    all-to-all, GB         1.07 (15361×)   4.29 (64×)     2.15 (32×)

On v6e:8x8, a predicted step of 156 s, 1578 response tokens a second a chip:

                           sample          train_step     evaluation
    arguments, GiB         0.10            0.84           0.63
    temporaries, GiB       18.45           5.25           3.96
    held beside, GiB       0.73            0.00           0.20
    peak of capacity, GiB  19.29 of 31.25  6.09 of 31.25  4.79 of 31.25
    model TFLOPs           1384            8811           4658
    program TFLOPs         1603            1.08e+04       4746
    HBM traffic, GB        2.358e+05       1.372e+04      7116
    compute, s             1.75            11.8           5.17
    HBM, s                 144             8.37           4.34
    links, s               0.0485          5.04           3.03
    bound by               HBM             compute        compute
    all-gather, GB         4.85 (169×)     571 (6353×)    499 (3650×)
    all-reduce, GB         1.48 (30755×)   174 (3523×)    26.2 (2003×)
    all-to-all, GB         1.07 (15361×)   4.29 (64×)     2.15 (32×)
"""

from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-1.7B"
    c.teacher.path = "preset:Qwen3-30B-A3B"
    c.teacher.weights = "int8"
    c.rollout.batch = 1024
    c.data.prompt_tokens = 1024
    c.rollout.max_tokens = 15360
    c.rollout.cache_dtype = "int8"
    c.rollout.cache_stages = 4
    c.mesh.tensor = 2  # a decode step reads half of the weights
    c.scoring.student = "recompute"
    c.scoring.chunk = 2048
    c.train.micro_batch = 64
    c.checkpoint.every = 10
    return c
