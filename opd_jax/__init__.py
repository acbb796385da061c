"""On-policy distillation in JAX, with supervision released where the teacher stops teaching."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m opd_jax.NAME, whose module is being looked for; none has been imported
    from opd_jax import memory

    memory.keep()
