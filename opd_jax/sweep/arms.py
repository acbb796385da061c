"""The arms of an ablation: named sets of config overrides, and seeds.

An ablation is a config file (configs/ablations/) with three parts:

- get_config(recipe) returns the config that all arms start from;
- arms(config) returns {name: {dotted key: value}};
- SEEDS are the seeds of every arm.

Arms are compared with the first one, or with the arm that the file's function against(name) returns. The mean
over benchmarks is over all, or over those in the file's MEAN.
"""

import copy
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config import get, load_module, validate
from opd_jax.errors import UserError, nearest

NAME = re.compile(r"[\w.=+-]+")


def grid(values: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any] | None = None) -> dict[str, dict]:
    """An arm for each combination of values, named "key=value+key=value"; `fixed` is set in all arms."""
    found = {}
    for combination in itertools.product(*values.values()):
        overrides = dict(zip(values, combination))
        name = "+".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())
        found[name] = overrides | dict(fixed or {})
    return found


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
      arm: name of its arm.
      against: name of the arm that it is compared with.
      seed: the run's seed.
      overrides: the arm's changes, dotted key -> value.
      workdir: folder of the run.
      config: the whole config, validated.
      mean: benchmarks that the table's mean averages; () is all.
    """

    arm: str
    against: str
    seed: int
    overrides: Mapping[str, Any]
    workdir: Path
    config: ConfigDict
    mean: tuple[str, ...] = ()


def plan(
    path: str, config: ConfigDict, out: str | Path, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Planned]:
    """The runs of the ablation in the file `path`, arm by arm.

    Args:
      config: the result of its get_config, with the changes of the command line.
      out: the folder of the sweep; a run's workdir is OUT/ARM/seed-N.
      only: names of the arms to run, () for all.
      seeds: replace the file's seeds unless empty.

    Raises:
      UserError: the file is not an ablation, or an arm is unknown or has a value that is not allowed.
    """
    module = load_module(path)
    if not hasattr(module, "arms") or not hasattr(module, "SEEDS"):
        raise UserError(
            f"--config={path} is no ablation, which needs arms(config) and SEEDS; see configs/ablations/"
        )
    arms = module.arms(config)
    for name in only:
        if name not in arms:
            raise UserError(f"--arms={name}: no such arm{nearest(name, arms)}; there are {', '.join(arms)}")
    first = next((name for name in arms if not only or name in only), "")
    against = getattr(module, "against", lambda name: first)
    mean = tuple(getattr(module, "MEAN", ()))
    runs = []
    for name, overrides in arms.items():
        if not NAME.fullmatch(name):
            raise UserError(f"arm {name!r} of {path}: use letters, digits and any of . = + - _ alone")
        for seed in seeds or module.SEEDS:
            changed = copy.deepcopy(config)
            try:
                for key in overrides:
                    get(config, key)
                    changed.update_from_flattened_dict({key: overrides[key]})
                changed.seed = seed
            except (KeyError, TypeError) as error:
                what = f"{key}={overrides[key]!r} does not fit docs/configs.md ({error.args[0]})"
                raise UserError(f"arm {name} of {path}: {what}") from error
            if not only or name in only:
                workdir = Path(out) / name / f"seed-{seed}"
                checked = validate(changed)
                runs.append(Planned(name, against(name), seed, overrides, workdir, checked, mean))
    return runs
