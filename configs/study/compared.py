"""The study's arms: what of each response is supervised."""

from configs.ablations import rule

NAMES = ("full", "release", "shuffled", "random", "prefix", "suffix", "advantage_std", "iw_opd")


def arms(config):
    """The arms of configs/ablations/rule.py that the study compares; the first is the reference."""
    known = rule.arms(config)
    return {name: known[name] for name in NAMES}
