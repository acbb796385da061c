"""Entry: a workdir, or several, -> one self-contained HTML page.

    python -m opd_jax.report --workdir=DIR [--workdir=DIR2 ...] [--out=FILE]

Works on a finished run and on one that goes on, and imports no JAX.
"""

from opd_jax.report.build import main

if __name__ == "__main__":
    main()
