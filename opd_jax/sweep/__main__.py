"""Runs an ablation: every arm with every seed, one after another, then one table and one page.

    python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/rule
    python -m opd_jax.sweep --config=configs/ablations/rule.py:configs/mine.py --out=runs/rule --jobs=jobs
    python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/rule --table

Started again with the same --out, it skips what is done and continues where it stopped. If eval.benchmark is
set, the teacher answers the benchmarks too, once; with --teacher only that is done. --jobs runs nothing and
writes a shell file for each run that is not done; with --settings, a settings file of launch/tpu.sh and
launch/gke.sh. --table only makes the table of the runs that are done.
"""

from absl import flags

from opd_jax.config import run
from opd_jax.sweep.runs import main

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of the sweep.")
    flags.DEFINE_list("arms", [], "Only these arms, by name.")
    flags.DEFINE_list("seeds", [], "These seeds in place of the file's.")
    flags.DEFINE_string("jobs", None, "Write a shell file a run into this folder instead of running.")
    flags.DEFINE_string("settings", None, "With --jobs: a settings file of launch/ to make one of each run.")
    flags.DEFINE_bool("teacher", False, "Only the teacher's answers to the benchmarks.")
    flags.DEFINE_bool("table", False, "Only the table of the runs that are done.")
    run(main)
