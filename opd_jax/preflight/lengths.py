"""How long the responses of a batch are: all at the limit, drawn, or as in a run."""

import json
from pathlib import Path

import numpy as np

from opd_jax.errors import UserError

FORMS = "full, lognormal:MEAN:SIGMA with MEAN a share of the limit, or a run's rollouts.jsonl"


def response_lengths(spec: str, rows: int, longest: int, seed: int = 0) -> np.ndarray:
    """[rows] lengths in tokens, from 1 to `longest`.

    Args:
      spec: one of FORMS. MEAN is that before lengths past the limit are cut to it; a file's are drawn with
        replacement.

    Raises:
      UserError: the form or the file is wrong.
    """
    if spec == "full":
        return np.full(rows, longest)
    rng = np.random.default_rng(seed)
    kind, *numbers = spec.split(":")
    if kind == "lognormal":
        try:
            mean, sigma = map(float, numbers)
        except ValueError:
            mean = sigma = float("nan")
        if not (mean > 0 and sigma >= 0):
            raise UserError(f"--lengths={spec}: give {FORMS}, such as lognormal:0.3:0.7")
        found = rng.lognormal(np.log(mean * longest) - sigma**2 / 2, sigma, rows)
    else:
        found = rng.choice(_written(spec), rows)
    return np.clip(np.rint(found), 1, longest).astype(int)


def _written(path: str) -> list[int]:
    """Tokens of each response of a rollouts.jsonl."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [int(json.loads(line)["tokens"]) for line in lines if line.strip()]
    except FileNotFoundError:
        raise UserError(f"--lengths={path}: there is no such file; give {FORMS}") from None
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    if not found:
        raise UserError(f"--lengths={path} has no records with tokens; give {FORMS}")
    return found
