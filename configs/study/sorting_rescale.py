"""The cutting rules of the sorting study without the loss-mass rescale.

    python -m opd_jax.sweep --config=configs/study/sorting_rescale.py --out=runs/study/sorting_rescale

`opd_jax.study.report` compares each arm, seed by seed, with the arm of configs/study/sorting.py that has the
same rule, with the rescale. An arm's name is that arm's name plus "+rescale=none".
"""

from configs.study import sorting
from configs.study.sorting import SEEDS, get_config  # noqa: F401

CUTTING = ("release", "shuffled", "random", "prefix", "suffix", "advantage_std")
WITHOUT = "+rescale=none"


def arms(config):
    """The arms of configs/study/sorting.py that cut responses, with release.rescale=none."""
    known = sorting.arms(config)
    return {name + WITHOUT: known[name] | {"release.rescale": "none"} for name in CUTTING}
