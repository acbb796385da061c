"""The study of docs/study.md on sorting: a small teacher teaches a pruned copy of itself; grading is exact.

python -m opd_jax.sweep --config=configs/study/sorting.py --out=runs/study/sorting
"""

from pathlib import Path

from ml_collections import ConfigDict

from opd_jax import config

rule = config.load_module("ablations/rule")

SEEDS = (0, 1, 2, 3, 4)
NAMES = ("full", "release", "shuffled", "random", "prefix", "suffix", "advantage_std", "iw_opd")
MODELS = Path(__file__).with_name("models")


def get_config():
    """40 steps of 32 responses; a run takes 15 seconds on two cores."""
    c = config.default()
    c.student.path = str(MODELS / "student")
    c.teacher.path = str(MODELS / "teacher")
    c.student.products = c.teacher.products = "compute"  # auto would depend on the machine
    c.data.source = "jsonl"
    c.data.path = "runs/sorting/prompts.jsonl"
    c.data.prompt_tokens = 16
    c.data.heldout = 128
    c.rollout.batch = 32
    c.rollout.max_tokens = 88
    c.scoring.chunk = 88
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 4
    c.train.steps = 40
    c.train.remat = "none"
    c.eval.every = 10
    c.checkpoint.every = 0
    c.metrics.rollouts_every = 5
    c.metrics.rollouts = 32
    c.metrics.tensorboard = False
    return c


def arms(config: ConfigDict) -> dict[str, dict]:
    """The arms of configs/ablations/rule.py that the study compares. The first is the reference."""
    known = rule.arms(config)
    return {name: known[name] for name in NAMES}
