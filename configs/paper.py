"""Qwen3-30B-A3B teaches Qwen3-1.7B on 64 v5p or v6e chips, 1024 rollouts of 16384 tokens a step.

    python -m opd_jax.preflight --config=configs/paper.py --topology=v5p:4x4x4
    python -m opd_jax.preflight --config=configs/paper.py --topology=v6e:8x8
    python -m opd_jax.train --config=configs/paper.py --workdir=runs/paper \
      --config.student.path=~/models/Qwen3-1.7B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Keys, values and the teacher's weights are int8.

Cost: at least 1.59 (v5p) or 2.19 (v6e) chip-hours a step with responses of full length, predicted by the
roofline below. Most of it is sampling, which reads the whole cache for each token. Preflight prints (jax
0.10.2, libtpu 0.0.42.1):

On v5p:4x4x4, a predicted step of 89.2 s, 2757 response tokens a second a chip:

                            sample          train_step     evaluation
    arguments, GiB          0.10            0.80           0.59
    temporaries, GiB        19.86           11.64          7.35
    resident, GiB           0.69            0.00           0.20
    peak of capacity, GiB   17.34 of 95.74  7.72 of 95.74  6.69 of 95.74
    model TFLOPs            1384            8811           4658
    program TFLOPs          1495            1.08e+04       4746
    HBM traffic, GB         1.814e+05       1.295e+04      6572
    compute, s              3.26            23.5           10.3
    HBM, s                  65.6            4.68           2.38
    links, s                1.54            7.85           3.84
    bound by                HBM             compute        compute
    all-gather, GB          302 (15755×)    629 (15729×)   263 (9298×)
    all-reduce, GB          122 (937019×)   738 (7652×)    433 (2851×)
    all-to-all, GB          2.15 (15361×)   8.59 (64×)     4.29 (32×)
    collective-permute, GB  –               208 (212160×)  –
    compile, s              100             145            33

On v6e:8x8, a predicted step of 123 s, 2006 response tokens a second a chip:

                            sample          train_step     evaluation
    arguments, GiB          0.10            0.80           0.59
    temporaries, GiB        19.08           11.67          7.79
    resident, GiB           0.69            0.00           0.20
    peak of capacity, GiB   17.41 of 31.25  7.71 of 31.25  6.68 of 31.25
    model TFLOPs            1384            8811           4658
    program TFLOPs          1495            1.08e+04       4746
    HBM traffic, GB         1.814e+05       1.295e+04      6572
    compute, s              1.63            11.8           5.17
    HBM, s                  111             7.91           4.01
    links, s                1.54            7.85           3.84
    bound by                HBM             compute        compute
    all-gather, GB          302 (15755×)    629 (15729×)   263 (9298×)
    all-reduce, GB          122 (937019×)   738 (7652×)    433 (2851×)
    all-to-all, GB          2.15 (15361×)   8.59 (64×)     4.29 (32×)
    collective-permute, GB  –               208 (212160×)  –
    compile, s              146             157            52
"""

from opd_jax import config


def get_config():
    """The default config with the models and sizes of this recipe."""
    c = config.default()
    c.student.path = "preset:Qwen3-1.7B"
    c.teacher.path = "preset:Qwen3-30B-A3B"
    c.teacher.weights = "int8"
    c.rollout.batch = 1024
    c.data.prompt_tokens = 1024
    c.rollout.max_tokens = 15360
    c.rollout.halvings = 3  # hours of ragged responses earn back the compile time
    c.rollout.cache_dtype = "int8"
    c.mesh.tensor = 2  # a decode step reads half of the weights
    c.scoring.student = "recompute"
    c.scoring.chunk = 2048
    c.train.micro_batch = 64
    c.checkpoint.every = 10
    return c
