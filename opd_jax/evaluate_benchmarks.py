"""The benchmark half of `python -m opd_jax.evaluate`: a checkpoint of a run, or any model, answers."""

from pathlib import Path

import jax
import jax.numpy as jnp

from opd_jax import benchmark_run, sharding, tokenizers
from opd_jax.errors import UserError
from opd_jax.grading import Grader
from opd_jax.job import prepare, sample_program, sampling
from opd_jax.models import source, transformer


def main(arguments):
    """Runs every --benchmark in turn; prints and writes each result as it is known.

    Args:
      arguments: the flags workdir, model, config, step, benchmark, samples, temperature and out.
    """
    from configs import default
    from opd_jax import evaluate

    if (arguments.workdir is None) == (arguments.model is None):
        raise UserError("--benchmark needs either --workdir=DIR of a run, or --model=FOLDER")
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples={arguments.samples} is out of range; it must be at least 1")
    if arguments.model is not None:
        if arguments.out is None:
            raise UserError("--model needs --out=FOLDER for the results")
        config = arguments.config or default.get_config()
        config.student.path = arguments.model
        _set_temperature(config, arguments.temperature)
        responder, params, label = *of_model(config), "model"
    else:
        config = evaluate.run_config(arguments.workdir)
        _set_temperature(config, arguments.temperature)
        config.eval.benchmark = ()
        job = prepare(config)
        params, label = evaluate.restore(job, arguments.workdir, arguments.step)
        responder = job.responder(job.key(benchmark_run.KEY))
    greedy = config.rollout.temperature == 0
    if greedy and (arguments.samples or 1) > 1:
        raise UserError(f"--samples={arguments.samples}: greedy responses are all the same; drop it")
    # All are read before the first is answered.
    exams = [
        benchmark_run.prepare(spec, responder.tokenizer, config.data, "--benchmark")
        for spec in arguments.benchmark
    ]
    folder = Path(arguments.out or Path(arguments.workdir) / benchmark_run.FOLDER)
    for exam in exams:
        samples = arguments.samples or (1 if greedy else exam.benchmark.samples)
        result = benchmark_run.answer(exam, responder, params, samples)
        path = benchmark_run.write(folder, f"{label}-greedy" if greedy else str(label), result)
        del result["rows"]
        if jax.process_index() == 0:
            evaluate.show(result | {"written to": path})


def of_model(config) -> tuple[benchmark_run.Responder, dict]:
    """(Responder, parameters) of the model that `student.path` names; the teacher is not looked at."""
    mesh = sharding.make_mesh(config.mesh)
    dtype = config.student.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = source.config(config.student.path, "--model").replace(compute_dtype=dtype)
    tokenizer = tokenizers.load(config.student.path, "--model")
    model = model.replace(eos_ids=tokenizers.end_ids(tokenizer, model))
    shardings = sharding.param_shardings(mesh, transformer.abstract(model), transformer.logical_axes(model))
    _, params = source.load(
        config.student.path, key="--model", mesh=mesh, shardings=shardings, dtype=jnp.float32
    )
    key = jax.random.fold_in(jax.random.key(config.seed), benchmark_run.KEY)
    responder = benchmark_run.Responder(
        sample=sample_program(mesh, model, sampling(config)),
        batch=config.rollout.batch,
        prompt_tokens=config.data.prompt_tokens,
        pad_id=model.pad_id,
        key=jax.device_put(key, sharding.replicated(mesh)),
        mesh=mesh,
        tokenizer=tokenizer,
        grader=Grader(),
    )
    return responder, params


def _set_temperature(config, temperature: float | None):
    if temperature is not None:
        if temperature < 0:
            raise UserError(f"--temperature={temperature} is out of range; it must be at least 0")
        config.rollout.temperature = temperature
        config.eval.samples = 1  # that of training is not used here
