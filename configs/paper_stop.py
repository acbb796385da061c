"""`paper.py` with rollouts that stop where the teacher stops teaching.

    python -m opd_jax.preflight --config=configs/paper_stop.py --topology=v5p:4x4x4 --stops=0.79:0.13:0.17
    python -m opd_jax.train --config=configs/paper_stop.py --workdir=runs/paper_stop \
      --config.student.path=~/models/Qwen3-1.7B --config.teacher.path=~/models/Qwen3-30B-A3B-Instruct-2507 \
      --config.data.source=jsonl --config.data.path=prompts.jsonl

The teacher's keys and values are int8 too. Rows halve once: some of 64 chips nearly always has more than a
quarter of its rows left. docs/stopping.md has what preflight says of it.
"""

from opd_jax import config


def get_config():
    """The config of `paper.py`, in which the teacher reads along."""
    c = config.load("paper")
    c.release.stop = "rule"
    c.release.stop_cache_dtype = "int8"
    c.rollout.halvings = 1
    return c
