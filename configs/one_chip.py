"""Qwen3-1.7B teaches Qwen3-0.6B on one v5e chip (16 GB), 32 rollouts of 1024 tokens a step.

    python -m opd_jax.preflight --config=configs/one_chip.py --topology=v5e:1x1
    python -m opd_jax.train --config=configs/one_chip.py --workdir=runs/one_chip \
      --config.student.path=~/models/Qwen3-0.6B --config.teacher.path=~/models/Qwen3-1.7B \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

Cost: at least 0.17 chip-hours for 100 steps, by the roofline below. Adam's first moment is bfloat16: with
float32, micro-batches of 2 fill the memory. Preflight's table (jax 0.10.2, libtpu 0.0.42.1):

                           sample          train_step      evaluation
    arguments, GiB         2.22            8.76            5.43
    temporaries, GiB       5.24            8.09            2.15
    held beside, GiB       6.54            0.00            3.33
    peak of capacity, GiB  13.98 of 15.75  14.58 of 15.75  10.91 of 15.75
    model TFLOPs           40.36           232.6           151.9
    program TFLOPs         42.77           277.8           155.7
    HBM traffic, GB        3884            889.2           408
    compute, s             0.217           1.41            0.79
    HBM, s                 4.74            1.09            0.498
    links, s               0               0               0
    bound by               HBM             compute         compute
    compile, s             36              54              13

Predicted step: 6.2 s at full length, 4000 response tokens a second; micro-batches of up to 8 fit. With
attention.kernel=plain train_step takes 2.19 s, bound by HBM, at the same peak, and the step 6.9 s.
"""

from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-0.6B"
    c.teacher.path = "preset:Qwen3-1.7B"
    c.rollout.batch = 32
    c.rollout.max_tokens = 768
    c.rollout.cache_stages = 4
    c.data.prompt_tokens = 256
    c.optimizer.mu_dtype = "bfloat16"
    c.train.micro_batch = 4
    return c
