"""A run's student as a Hugging Face model folder: weights, config, generation config, tokenizer, template.

    python -m opd_jax.export --workdir=runs/release --out=models/student              # newest checkpoint
    python -m opd_jax.export --workdir=runs/release --out=models/student --step=best --dtype=bfloat16

Needs the run's student.path (its config and tokenizer), not its teacher or prompts. On a pod every host runs
it with the same --out on a shared disk.
"""

import jax
from absl import flags

from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, tokenizers, transformer
from opd_jax.models.files import hf, source
from opd_jax.parallel import distributed, sharding
from opd_jax.progress import Progress
from opd_jax.run import Checkpoints, run_config, unwritable

DTYPES = ("float32", "bfloat16", "float16")


def export(workdir, out, step="latest", dtype: str = "float32") -> tuple[int, ModelConfig]:
    """Writes a checkpoint's student to `out`, which appears only when it is complete.

    Args:
      workdir: folder of the run.
      out: must not exist, or be an empty folder.
      step: "latest", "best" (by held-out KL) or a number.
      dtype: of the saved weights; float32 keeps every bit of the checkpoint.

    Returns:
      (the checkpoint's step, the student's config).

    Raises:
      UserError: no run, no such checkpoint, a student that is gone or another one, or a folder that is taken.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not known; use one of {', '.join(DTYPES)}")
    hf.check_unused(out)
    config = run_config(workdir)
    model = source.config(config.student.path, "student.path")
    model = model.without(config.student.drop_layers)
    tokenizer = tokenizers.load(config.student.path, "student.path")
    chosen = config.rollout.get("end_ids", ())  # older runs have no such field
    model = model.replace(eos_ids=tokenizers.end_ids(tokenizer, model, chosen))

    mesh = sharding.make_mesh({"preset": "slices", "data": 0, "fsdp": 0, "tensor": 0})
    abstract = transformer.abstract(model)
    shardings = sharding.param_shardings(mesh, abstract, transformer.logical_axes(model))
    with Checkpoints.of_run(workdir, config.checkpoint.keep) as checkpoints, Progress() as progress:
        step = checkpoints.find(step)
        with progress.phase(f"reading the checkpoint of step {step}"):
            params = checkpoints.restore_params(step, abstract, shardings)
    where = source.resolve(config.student.path, "student.path")
    generation = {} if where.kind == "gguf" else hf.read_generation(where.path)
    try:
        with Progress() as progress, progress.phase(f"writing {out}"):
            hf.save(out, model, params, tokenizer, dtype=dtype, generation=generation)
    except OSError as error:
        raise unwritable(out, error) from error
    return step, model


def main(_):
    for name in ("workdir", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is not set")
    distributed.initialize()
    workdir, out = flags.FLAGS.workdir, flags.FLAGS.out
    step, model = export(workdir, out, flags.FLAGS.step, flags.FLAGS.dtype)
    if jax.process_index() == 0:
        size = f"{model.parameter_count():,} parameters"
        print(f"{out}: the student of step {step}, {size}, {flags.FLAGS.dtype}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run.")
    flags.DEFINE_string("out", None, "The folder to write; must not exist, or be empty.")
    flags.DEFINE_string("step", "latest", "Which checkpoint: latest, best, or a number.")
    flags.DEFINE_string("dtype", "float32", "Of the saved weights: float32, bfloat16 or float16.")
    run(main)
