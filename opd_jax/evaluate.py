"""Evaluation: the student's distance to the teacher on held-out prompts, or its accuracy on benchmarks.

python -m opd_jax.evaluate --workdir=runs/release               # newest checkpoint of a run
python -m opd_jax.evaluate --workdir=runs/release --step=best
python -m opd_jax.evaluate --config=configs/demo.py             # the student before training
python -m opd_jax.evaluate --workdir=runs/release --benchmark=rg:chain_sum --samples=4
python -m opd_jax.evaluate --model=FOLDER --benchmark=gsm8k:test.jsonl --out=results/base
"""

import json
from pathlib import Path

import jax
from absl import flags, logging

from opd_jax import config as configs
from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.evaluation import answering, evaluate
from opd_jax.parallel import distributed
from opd_jax.progress import Progress
from opd_jax.run import make_folder, of_model, prepare, restore_params, run_config


def main(_):
    distributed.initialize()
    if flags.FLAGS.benchmark:
        answer_benchmarks(flags.FLAGS)
        return
    if flags.FLAGS.model:
        raise UserError("--model needs --benchmark=NAME; the distance to a teacher is for runs alone")
    workdir = flags.FLAGS.workdir
    if (workdir is None) == (flags.FLAGS.config is None):
        raise UserError("give either --workdir=DIR of a run, or --config=FILE for its start")
    config = flags.FLAGS.config if workdir is None else run_config(workdir)
    with Progress() as progress:
        job = prepare(config, progress=progress)
        _check_heldout(job)
        with progress.phase("reading the student's weights"):
            if workdir is None:
                params = job.start().params
            else:
                params, step = restore_params(job, workdir, flags.FLAGS.step)
        with progress.phase("reading the teacher's weights"):
            teacher_params = job.teacher_params()
        result = evaluate(job, params, teacher_params, progress)
    rows = result.pop("rows")
    if jax.process_index() != 0:
        return
    show(result)
    if workdir is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(workdir) / f"evaluation_{step}.jsonl").write_text(lines)


def answer_benchmarks(arguments):
    """Runs every --benchmark in turn; prints and writes each result as it is known.

    Args:
      arguments: the flags workdir, model, config, step, benchmark, samples, temperature and out.
    """
    if (arguments.workdir is None) == (arguments.model is None):
        raise UserError("--benchmark needs either --workdir=DIR of a run, or --model=FOLDER")
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples={arguments.samples} is out of range; it must be at least 1")
    if arguments.workdir is not None and arguments.config is not None:
        raise UserError("--workdir has its own config; drop --config and --config.KEY=VALUE")
    if arguments.model is not None:
        if arguments.out is None:
            raise UserError("--model needs --out=FOLDER for the results")
        config = arguments.config or configs.default()
        config.student.path = config.teacher.path = arguments.model
        _set_temperature(config, arguments.temperature)
        response_sampler, params, label, prompts = *of_model(config), "model", None
    else:
        config = run_config(arguments.workdir)
        _set_temperature(config, arguments.temperature)
        config.eval.benchmark = ()
        job = prepare(config)
        with Progress() as progress, progress.phase("reading the checkpoint"):
            params, label = restore_params(job, arguments.workdir, arguments.step)
        response_sampler, prompts = job.response_sampler(), job.prompts
    greedy = config.rollout.temperature == 0
    if greedy and (arguments.samples or 1) > 1:
        raise UserError(f"--samples={arguments.samples}: greedy responses are all the same; drop it")
    # All are read before the first is answered.
    heldout = prompts.heldout if prompts else ()
    rendered_benchmarks = answering.prepare(
        arguments.benchmark, response_sampler.tokenizer, config.data, "--benchmark", heldout
    )
    shared = answering.shared_with_training(prompts, rendered_benchmarks) if prompts else []
    if shared:
        logging.warning("%s", answering.say_shared(shared))
    folder = Path(arguments.out or f"{arguments.workdir}/{answering.FOLDER}")
    make_folder(folder)
    answering.write_shared(folder, shared)
    for rendered in rendered_benchmarks:
        samples = arguments.samples or (1 if greedy else rendered.benchmark.samples)
        result = answering.answer(rendered, response_sampler, params, samples)
        path = answering.write(folder, f"{label}-greedy" if greedy else str(label), result)
        del result["rows"]
        if jax.process_index() == 0:
            show(result | {"written to": path})


def _set_temperature(config, temperature: float | None):
    if temperature is not None:
        if temperature < 0:
            raise UserError(f"--temperature={temperature} is out of range; it must be at least 0")
        config.rollout.temperature = temperature
        config.eval.samples = 1  # that of training is not used here


def show(result: dict):
    """Prints a name and a value a line."""
    for name, value in result.items():
        print(f"{name:>16}  {value:.4g}" if isinstance(value, float) else f"{name:>16}  {value}")


def _check_heldout(job):
    if not job.prompts.heldout:
        raise UserError("data.heldout=0 leaves no prompt to evaluate on; set it to 1 or more")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A run to evaluate.")
    flags.DEFINE_string("model", None, "A model to evaluate: a folder, a .gguf file or pkg:NAME.")
    flags.DEFINE_multi_string("benchmark", [], "NAME:FILE, champ or rg:TASK[:COUNT]; may be repeated.")
    flags.DEFINE_integer("samples", None, "Responses a problem; the benchmark's usual number by default.")
    flags.DEFINE_float("temperature", None, "Sampling temperature, 0 is greedy; the config's by default.")
    flags.DEFINE_string("out", None, "Folder of the results; WORKDIR/benchmarks by default.")
    flags.DEFINE_string("step", "latest", "Which checkpoint of it: latest, best, or a number.")
    run(main, without_file=True)
