"""What a run draws random numbers for: one PRNG key for each purpose, all from the run's seed."""

import enum


class Key(enum.IntEnum):
    """The number that is folded into the run's seed. A new purpose takes the next number.

    SAMPLING: the rollouts that are trained on.
    EVALUATION: responses to held-out prompts, the same draws in every evaluation of a run.
    RELEASE: rules that draw.
    BENCHMARKS: responses to benchmarks.
    """

    SAMPLING = 0
    EVALUATION = 1
    RELEASE = 2
    BENCHMARKS = 3
