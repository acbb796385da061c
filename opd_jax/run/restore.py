"""Reads a run back: its config and its checkpoints. Also reads a whole model that answers benchmarks."""

from absl import logging
from ml_collections import ConfigDict

from opd_jax.config import default, validate
from opd_jax.errors import UserError
from opd_jax.evaluation import ResponseSampler, shared_grader
from opd_jax.models import tokenizers, transformer
from opd_jax.models.files import source
from opd_jax.parallel import compile_cache, sharding
from opd_jax.progress import Progress
from opd_jax.run import programs, resolve, sizes
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.draw import Draw, batching_of
from opd_jax.run.keys import Key
from opd_jax.run.run_record import read_config


def run_config(workdir) -> ConfigDict:
    """The config of the run in a workdir.

    Fields that are newer than the run have their defaults. Fields that this version does not have any more
    are named in a warning and left out.

    Raises:
      UserError: there is none, or it is damaged.
    """
    found = read_config(workdir)
    if found is None:
        raise UserError(f"--workdir={workdir} holds no run (no config.json)")
    try:
        config = default(plugins=found.get("plugins", ()))
        config.update(_known(found, config))
    except UserError:  # of a plugin
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--workdir={workdir}: config.json has a field that does not fit docs/configs.md ({error}); "
            "restore it"
        ) from error
    return config


def _known(found: dict, config: ConfigDict, prefix: str = "") -> dict:
    """What the config has fields for."""
    known = {}
    for key, value in found.items():
        if key not in config:
            logging.warning("%s%s=%r is no field of this version; it is left out", prefix, key, value)
        elif isinstance(config[key], ConfigDict) and isinstance(value, dict):
            known[key] = _known(value, config[key], f"{prefix}{key}.")
        else:
            known[key] = value
    return known


def restore_params(job, workdir, wanted: str) -> tuple[dict, int]:
    """(parameters, steps done) of a run's checkpoint: latest, best, or a number.

    The optimizer's state is not read: it would take twice the memory of the parameters.
    """
    with Checkpoints.of_run(workdir, job.config.checkpoint.keep) as checkpoints:
        step = checkpoints.find(wanted)
        abstract = transformer.abstract(job.student)
        return checkpoints.restore_params(step, abstract, job.state_shardings.params), step


def of_model(config) -> tuple[ResponseSampler, dict]:
    """(ResponseSampler, parameters) of the model that `student.path` names, in student.compute_dtype."""
    validate(config)
    compile_cache.enable(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, "rollout.batch", config.rollout.batch)
    path = config.student.path
    model = resolve.model(path, "--model", mesh, config.student.compute_dtype)
    model = model.replace(cache_reads=resolve.cache_reads(config, model))
    sizes.check_length(config, "--model", model)
    tokenizer = tokenizers.load(path, "--model")
    model = model.replace(eos_ids=tokenizers.end_ids(tokenizer, model, config.rollout.end_ids))
    shardings = programs.param_shardings(mesh, model)
    with Progress() as progress, progress.phase("reading the weights"):
        _, params = source.load(path, key="--model", mesh=mesh, shardings=shardings, dtype=model.dtype)
    response_sampler = ResponseSampler(
        draw=Draw(
            programs.sample_program(mesh, model, programs.sampling(config)),
            sharding.key(mesh, config.seed, Key.BENCHMARKS),
            mesh,
        ),
        batching=batching_of(config, mesh, model),
        mesh=mesh,
        tokenizer=tokenizer,
        grader=shared_grader(),
    )
    return response_sampler, params
