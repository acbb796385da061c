"""A real language model heals a smaller one: full supervision against the release rule, side by side.

    make demo
    make demo ARGS="--minutes=20 --config.seed=1"
    python -m opd_jax.demo --out=runs/demo

It first measures the machine, then does as much as fits into --minutes: held-out prompts, training steps, and
at the end long answers.
"""

from absl import flags

from opd_jax.config import run
from opd_jax.demo.story import main

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of both runs; runs/demo-DATE-TIME if not given.")
    flags.DEFINE_float("minutes", 8.0, "Time for all of it; 0 sets no limit.")
    run(main, config="demo")
