"""A worker of `grading`: reads tasks from standard input, one JSON object per line, and writes verdicts.

    python -m opd_jax.evaluation.grading_worker SECONDS MEMORY_BYTES

A child process does the tasks. If a task kills it, the next child starts at once, with all imports done.
"""

import functools
import json
import os
import resource
import signal
import sys

from opd_jax.evaluation import answers


def main():
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    # Verdicts are written to a copy of standard output. Standard output itself, where parsers print, is
    # discarded.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.grade("\\boxed{\\frac{1}{2}}", "x + 1")  # loads the parsers before any task is timed
    print(json.dumps("ready"), file=out, flush=True)
    while True:
        child = os.fork()
        if not child:
            _serve(seconds, memory, out)
            os._exit(0)  # the end of standard input
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        failed = "time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "crash"
        print(json.dumps({"right": False, "failed": failed}), file=out, flush=True)


def _serve(seconds: float, memory: int, out):
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the kernel kills this process even inside a C loop
        verdict = json.dumps(_verdict(**json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=out, flush=True)


def _verdict(response: str, answer: str, problem: list | None) -> dict:
    try:
        if problem is None:
            return {"right": answers.grade(response, answer)}
        return {"right": _gym_score(tuple(problem), response) >= 1.0}
    except (Exception, RecursionError, MemoryError) as error:
        # Parsers raise all kinds of errors on text that is not mathematics.
        return {"right": False, "failed": "crash" if isinstance(error, MemoryError) else "error"}


def _gym_score(problem: tuple[str, int, int, int], response: str) -> float:
    *generator, index = problem
    dataset = _gym(*generator)
    said = answers.final_answers(response)
    return dataset.score_answer((said or [response])[-1].strip(), dataset[index])


@functools.cache
def _gym(task: str, size: int, seed: int):
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=size, seed=seed)


if __name__ == "__main__":
    main()
