"""What keeping freed memory saves (opd_jax/parallel/memory.py): CPU seconds and page faults of each program.

    python -m benchmarks.kept_memory

Each setting runs in its own process. In each of four rounds the demo's student writes 8 answers, both models
are compared on them, and the student trains on them. The last round is printed.
"""

import resource
import subprocess
import sys
import time

import jax

from opd_jax.config import load
from opd_jax.distill import StepInputs
from opd_jax.parallel import sharding
from opd_jax.run import prepare

ROUNDS = 4
# Code that a process runs before any other import.
FIRST = {"given back": "", "kept": "from opd_jax.parallel import memory; memory.keep(); "}


def measured(function, *args):
    """The result of one call, and what it used: name -> amount."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = jax.block_until_ready(function(*args))
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return result, {
        "wall s": wall,
        "user s": after.ru_utime - before.ru_utime,
        "system s": after.ru_stime - before.ru_stime,
        "page faults": after.ru_minflt - before.ru_minflt,
    }


def rounds(memory: str):
    """Prints what each program used in the last round."""
    c = load("demo")
    job = prepare(c)
    teacher_params, state = job.teacher_params(), job.start()
    prompts, key = job.training_batches(), job.key(0)
    for _ in range(ROUNDS):
        batch = sharding.put_batch(job.mesh, next(prompts))
        drawn = batch.tokens_BP, batch.mask_BP, key, state.step
        rollouts, of_sample = measured(job.sample_group, state.params, *drawn)
        _, of_compare = measured(job.divergence, state.params, teacher_params, rollouts)
        inputs = StepInputs(teacher_params, rollouts, job.segment_table(rollouts), key)
        (state, *_), of_step = measured(job.train_step, state, inputs)
    for name, amounts in (("sample", of_sample), ("compare", of_compare), ("train_step", of_step)):
        cells = "".join(f"{amounts[column]:>14,.2f}" for column in amounts)
        print(f"{memory:<12}{name:<12}{cells}", flush=True)


if __name__ == "__main__":
    columns = "".join(f"{name:>14}" for name in ("wall s", "user s", "system s", "page faults"))
    print(f"{'memory':<12}{'program':<12}{columns}", flush=True)
    for memory, first in FIRST.items():
        code = f"{first}from benchmarks.kept_memory import rounds; rounds({memory!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
