"""Varies where responses end: full supervision, the rule on whole responses, and ways to stop them.

    python -m opd_jax.sweep --config=configs/ablations/stop.py --out=runs/stop
    python -m opd_jax.sweep --config=configs/ablations/stop.py:configs/mine.py --out=runs/stop

`random` draws a length for each response between 1 token and the limit, and `length` stops at half of the
limit, so both write half of the tokens of responses that do not end by themselves. Long responses are needed:
`release.stop_after` sentences must follow a cut before the rule is certain of it.

Cost: 24 runs of 24 steps of the demo's recipe, whose times are in docs/demo.md.
"""

from ml_collections import ConfigDict

from opd_jax.config import load

SEEDS = (0, 1, 2)


def get_config(recipe="configs/demo.py"):
    """The recipe that every arm starts from."""
    return load(recipe)


def arms(config: ConfigDict) -> dict[str, dict]:
    """A rule and a way to stop in each arm; full supervision is the first."""
    longest, steps = config.rollout.max_tokens, config.train.steps
    ways = {
        "full": ("none", "never"),
        "release": ("paper", "never"),
        "release_stops": ("paper", "rule"),
        "length": ("none", f"length:{max(1, longest // 2)}"),
        "grow": ("none", f"grow:{max(1, longest // 8)}:{longest}:{steps}"),
        "random": ("none", f"random:1:{longest}"),
        "kat_stops": ("kat", "rule"),
        "prune_opd_stops": ("prune_opd", "rule"),
    }
    more = {"prune_opd_stops": {"release.prune_base": 0.0}}
    return {
        name: {"release.rule": rule, "release.stop": stop} | more.get(name, {})
        for name, (rule, stop) in ways.items()
    }
