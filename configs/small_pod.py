from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-1.7B"
    c.teacher.path = "preset:Qwen3-8B"
    c.rollout.batch = 256
    c.data.prompt_tokens = 512
    c.rollout.max_tokens = 3584
    c.scoring.chunk = 1024
    c.train.micro_batch = 16
    return c
