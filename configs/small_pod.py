"""Qwen3-8B teaches Qwen3-1.7B on 16 v5e chips, 256 rollouts of 4096 tokens a step.

    python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4
    python -m opd_jax.train --config=configs/small_pod.py --workdir=runs/small_pod \
      --config.student.path=~/models/Qwen3-1.7B --config.teacher.path=~/models/Qwen3-8B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

The mesh is chosen from the search in docs/preflight.md. Chunks of the loss are long, because each chunk sums
the gradient of the output matrix over the slice.

Cost: at least 16 chip-hours for 100 steps, predicted by the roofline below. Preflight prints (jax 0.10.2,
libtpu 0.0.42.1):

                            sample          train_step     evaluation
    arguments, GiB          0.40            2.17           1.36
    temporaries, GiB        9.13            5.87           3.02
    resident, GiB           1.76            0.00           0.80
    peak of capacity, GiB   10.30 of 15.75  6.35 of 15.75  4.81 of 15.75
    model TFLOPs            251.2           1815           1312
    program TFLOPs          257.6           2087           1341
    HBM traffic, GB         2.135e+04       2613           1403
    compute, s              1.31            10.6           6.81
    HBM, s                  26.1            3.19           1.71
    links, s                2.2             6.3            4.22
    bound by                HBM             compute        compute
    all-gather, GB          141 (3979×)     83.3 (10353×)  67.3 (7186×)
    all-reduce, GB          61.2 (218683×)  309 (4228×)    218 (2275×)
    all-to-all, GB          1.07 (3585×)    4.29 (48×)     3.22 (32×)
    collective-permute, GB  –               37.3 (14208×)  –
    compile, s              104             76             26

Predicted step: 36.7 s at full length, 1564 response tokens a second a chip; micro-batches of up to 64 fit.
"""

from opd_jax import config


def get_config():
    """The default config with the models and sizes of this recipe."""
    c = config.default()
    c.student.path = "preset:Qwen3-1.7B"
    c.teacher.path = "preset:Qwen3-8B"
    c.rollout.batch = 256
    c.data.prompt_tokens = 512
    c.rollout.max_tokens = 3584
    c.rollout.halvings = 2  # hours of ragged responses earn back the compile time
    c.mesh.tensor = 4  # a decode step reads a quarter of the weights
    c.scoring.chunk = 1024
    c.train.micro_batch = 16
    c.checkpoint.every = 20
    return c
