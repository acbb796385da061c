"""A worker of `grading`: reads tasks from standard input, a JSON object a line, and writes verdicts.

    python -m opd_jax.grading_worker SECONDS MEMORY_BYTES
"""

import functools
import json
import os
import resource
import signal
import sys

from opd_jax import answers

GRACE_SECONDS = 5.0  # after the limit, for the caller to end this process first


def main():
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    # Verdicts go out on a copy of standard output; whatever a parser prints goes nowhere.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import math_verify  # noqa: F401  not within the first task's time

    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        # The kernel ends this process even inside a C loop, should the caller be gone.
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
        print(json.dumps(_verdict(**json.loads(line))), file=out, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _verdict(response: str, answer: str, problem: list | None) -> dict:
    try:
        if problem is None:
            return {"right": answers.grade(response, answer)}
        return {"right": _gym_score(tuple(problem), response) >= 1.0}
    except (Exception, RecursionError, MemoryError) as error:
        # Parsers raise whatever they like on text that is no mathematics: such an answer is wrong.
        return {"right": False, "failed": "crash" if isinstance(error, MemoryError) else ""}


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
