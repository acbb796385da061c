"""The sorting study's student: its teacher without the weights of least magnitude.

    python -m studies.prune --model=models/teacher --share=0.4 --out=models/student

Distillation is then to heal what pruning broke. Nothing holds the pruned weights at 0 while it does.
Source: magnitude pruning within each layer, Han et al. 2015 (arXiv 1506.02626).
"""

import shutil
from pathlib import Path

import numpy as np
from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from opd_jax import config
from opd_jax.errors import UserError
from opd_jax.models.files import hf

WEIGHTS = "model.safetensors"


def pruned(weight, share: float):
    """A matrix with the `share` of its entries that are least in magnitude set to 0; vectors as they are."""
    if weight.ndim < 2:
        return weight
    magnitude = np.abs(weight.astype(np.float32))
    return np.where(magnitude <= np.quantile(magnitude, share), 0, weight).astype(weight.dtype)


def prune(model: Path, share: float, out: Path) -> None:
    """Writes `out`, a copy of a model folder with every matrix `pruned`, the embedding too.

    Raises:
      UserError: no weights of one file in `model`, a share that is not between 0 and 1, or `out` is taken
        or cannot be written.
    """
    if not 0 < share < 1:
        raise UserError(f"--share={share}: give the share of weights to set to 0, between 0 and 1")
    try:
        weights = load_file(model / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--model={model}: no {WEIGHTS} that can be read; give a model folder") from error
    weights = {name: pruned(weight, share) for name, weight in weights.items()}
    try:
        hf.check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
        save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(model / WEIGHTS, out / WEIGHTS)  # save_file's is for its owner alone
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"--out={out} cannot be written ({reason}); choose another folder") from error


def main(_):
    for name in ("model", "share", "out"):
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is not set")
    prune(Path(flags.FLAGS.model), flags.FLAGS.share, Path(flags.FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The model folder to prune.")
    flags.DEFINE_float("share", None, "Share of each matrix's entries that are set to 0.")
    flags.DEFINE_string("out", None, "The folder to write; must not exist, or be empty.")
    config.run(main)
