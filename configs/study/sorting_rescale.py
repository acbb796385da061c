"""The cutting rules of the sorting study without the loss-mass rescale.

    python -m opd_jax.sweep --config=configs/study/sorting_rescale.py --out=runs/study/sorting_rescale

`studies.report` compares each arm, seed by seed, with the arm of configs/study/sorting.py that has the
same rule, with the rescale. An arm's name is that arm's name plus "+rescale=none".
"""

from ml_collections import ConfigDict

from opd_jax import config

sorting = config.load_module("study/sorting")
SEEDS, get_config = sorting.SEEDS, sorting.get_config

CUTTING = ("release", "shuffled", "random", "prefix", "suffix", "advantage_std")
WITHOUT = "+rescale=none"


def arms(config: ConfigDict) -> dict[str, dict]:
    """The arms of configs/study/sorting.py that cut responses, with release.rescale=none."""
    known = sorting.arms(config)
    return {name + WITHOUT: known[name] | {"release.rescale": "none"} for name in CUTTING}
