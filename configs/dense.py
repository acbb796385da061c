from configs import default


def get_config():
    """The default config with this recipe's models and sizes."""
    c = default.get_config()
    c.student.path = "preset:Qwen3-8B"
    c.teacher.path = "preset:Qwen3-32B"
    c.rollout.batch = 512
    c.data.prompt_tokens = 1024
    c.rollout.max_tokens = 7168
    c.scoring.chunk = 1024
    c.train.micro_batch = 64
    return c
