"""The benchmark half of `python -m opd_jax.evaluate`: a checkpoint of a run, or any model, answers."""

from pathlib import Path

import jax
from absl import logging

from configs import default
from opd_jax import benchmark_run, compile_cache, programs, sharding, sizes, tokenizers
from opd_jax.config import validate
from opd_jax.errors import UserError
from opd_jax.grading import shared as shared_grader
from opd_jax.job import prepare
from opd_jax.models import source
from opd_jax.outputs import make_folder
from opd_jax.progress import Progress


def main(arguments):
    """Runs every --benchmark in turn; prints and writes each result as it is known.

    Args:
      arguments: the flags workdir, model, config, step, benchmark, samples, temperature and out.
    """
    from opd_jax import evaluate

    if (arguments.workdir is None) == (arguments.model is None):
        raise UserError("--benchmark needs either --workdir=DIR of a run, or --model=FOLDER")
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples={arguments.samples} is out of range; it must be at least 1")
    if arguments.workdir is not None and arguments.config is not None:
        raise UserError("--workdir has its own config; drop --config and --config.KEY=VALUE")
    if arguments.model is not None:
        if arguments.out is None:
            raise UserError("--model needs --out=FOLDER for the results")
        config = arguments.config or default.get_config()
        config.student.path = config.teacher.path = arguments.model
        _set_temperature(config, arguments.temperature)
        responder, params, label, prompts = *of_model(config), "model", None
    else:
        config = evaluate.run_config(arguments.workdir)
        _set_temperature(config, arguments.temperature)
        config.eval.benchmark = ()
        job = prepare(config)
        with Progress() as progress, progress.phase("reading the checkpoint"):
            params, label = evaluate.restore(job, arguments.workdir, arguments.step)
        responder, prompts = job.responder(job.key(benchmark_run.KEY)), job.prompts
    greedy = config.rollout.temperature == 0
    if greedy and (arguments.samples or 1) > 1:
        raise UserError(f"--samples={arguments.samples}: greedy responses are all the same; drop it")
    # All are read before the first is answered.
    heldout = prompts.heldout if prompts else ()
    exams = benchmark_run.prepare(
        arguments.benchmark, responder.tokenizer, config.data, "--benchmark", heldout
    )
    shared = benchmark_run.shared_with_training(prompts, exams) if prompts else []
    if shared:
        logging.warning("%s", benchmark_run.say_shared(shared))
    folder = Path(arguments.out or Path(arguments.workdir) / benchmark_run.FOLDER)
    make_folder(folder)
    benchmark_run.write_shared(folder, shared)
    for exam in exams:
        samples = arguments.samples or (1 if greedy else exam.benchmark.samples)
        result = benchmark_run.answer(exam, responder, params, samples)
        path = benchmark_run.write(folder, f"{label}-greedy" if greedy else str(label), result)
        del result["rows"]
        if jax.process_index() == 0:
            evaluate.show(result | {"written to": path})


def of_model(config) -> tuple[benchmark_run.Responder, dict]:
    """(Responder, parameters) of the whole model that `student.path` names, in student.compute_dtype."""
    validate(config)
    compile_cache.enable(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, "rollout.batch", config.rollout.batch)
    path = config.student.path
    model = programs.model(path, "--model", mesh, config.student.compute_dtype)
    sizes.check_length(config, "--model", model)
    tokenizer = tokenizers.load(path, "--model")
    model = model.replace(eos_ids=tokenizers.end_ids(tokenizer, model, config.rollout.end_ids))
    shardings = programs.param_shardings(mesh, model)
    with Progress() as progress, progress.phase("reading the weights"):
        _, params = source.load(path, key="--model", mesh=mesh, shardings=shardings, dtype=model.dtype)
    responder = benchmark_run.Responder(
        sample=programs.sample_program(mesh, model, programs.sampling(config)),
        batch=config.rollout.batch,
        prompt_tokens=config.data.prompt_tokens,
        pad_id=model.pad_id,
        key=sharding.key(mesh, config.seed, benchmark_run.KEY),
        mesh=mesh,
        tokenizer=tokenizer,
        grader=shared_grader(),
    )
    return responder, params


def _set_temperature(config, temperature: float | None):
    if temperature is not None:
        if temperature < 0:
            raise UserError(f"--temperature={temperature} is out of range; it must be at least 0")
        config.rollout.temperature = temperature
        config.eval.samples = 1  # that of training is not used here
