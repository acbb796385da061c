"""Two runs or models side by side, problem by problem: is the difference more than chance?

    python -m opd_jax.compare runs/full runs/release

Each is a workdir, a folder of benchmark results, or one results file. The command compares the newest results
of every benchmark that both have. For two workdirs it also compares the KL of the last held-out evaluation.
"""

import argparse
from collections.abc import Sequence

from opd_jax.errors import UserError, fail
from opd_jax.evaluation import compare, statement


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m opd_jax.compare", description=__doc__)
    parser.add_argument("a", help="A: a workdir, a folder of results, or a results file")
    parser.add_argument("b", help="B: the same")
    options = parser.parse_args(argv)
    try:
        found = compare(options.a, options.b)
    except UserError as error:
        fail(error)
    print(f"A: {options.a}\nB: {options.b}")
    for name, values in found.items():
        print(statement(name, *values))
    if len(found) > 1:
        print(f"{len(found)} comparisons: each p-value is of its own, none is corrected for the others.")


if __name__ == "__main__":
    main()
