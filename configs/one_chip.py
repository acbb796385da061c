from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-0.6B"
    c.teacher.path = "preset:Qwen3-1.7B"
    c.rollout.batch = 32
    c.rollout.max_tokens = 768
    c.data.prompt_tokens = 256
    c.optimizer.mu_dtype = "bfloat16"
    c.train.micro_batch = 8
    return c
