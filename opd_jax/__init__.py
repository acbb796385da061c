"""On-policy distillation in JAX, with supervision released where the teacher stops teaching."""

import sys

__version__ = "0.2.0.dev0"  # setup.py reads this line

# python -m opd_jax.NAME, before any other module is imported. Grading workers run no XLA program.
if sys.argv[:1] == ["-m"] and "opd_jax.evaluation.grading_worker" not in sys.orig_argv:
    from opd_jax.parallel import memory

    memory.keep()
