"""Where supervision of a response stops: segment scores, the change point, and the rules by name.

In: the teacher's scores and the segment number of every token. Out: a `Release`: the weight of every token.
May import: models, parallel and the rooms before them. Needs jax alone, so another trainer can use it.
"""

# Imported at once: a function has its module's name here, and would be hidden behind the module otherwise.
from opd_jax.release.change_point import ChangePoint, change_point
from opd_jax.release.release import RESCALES, Margins, Release, certain, ended, release
from opd_jax.release.rules import CERTAIN, RULES, Proposal, at_once, by_gain, propose, rule

__all__ = [
    "CERTAIN",
    "RESCALES",
    "RULES",
    "ChangePoint",
    "Margins",
    "Proposal",
    "Release",
    "at_once",
    "by_gain",
    "certain",
    "change_point",
    "ended",
    "propose",
    "release",
    "rule",
]
