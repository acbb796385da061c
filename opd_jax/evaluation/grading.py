"""Grades many answers in worker processes, each task within a time limit, so that none can harm a run.

A worker that is past the limit, out of memory or crashed is replaced, and its task is not right.
Workers import neither JAX nor what the caller runs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 5.0
GRACE_SECONDS = 5.0  # after the limit, for the worker to say so itself
START_SECONDS = 120.0  # for Python and sympy on a busy machine
MEMORY_BYTES = 4 << 30
WORKER = "opd_jax.evaluation.grading_worker"


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer to grade.

    Attributes:
      response: what the model wrote.
      answer: the reference answer.
      problem: where reasoning-gym's own scorer decides: (task, size, seed, index) of its generator.
    """

    response: str
    answer: str
    problem: tuple[str, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """right: the answer equals the reference. failed: "" or why it was not graded: time, crash, error."""

    right: bool
    failed: str = ""


class Grader:
    """A pool of worker processes, started at the first use and ended with this object.

    Args:
      workers: how many; by default one a core, at most 8.
      seconds: wall-clock limit of one task.
    """

    def __init__(self, workers: int | None = None, seconds: float = SECONDS):
        count = workers or min(8, os.cpu_count() or 1)
        self._workers = [_Worker(seconds) for _ in range(count)]
        self._finalizer = weakref.finalize(self, _end, self._workers)

    def grade(
        self, tasks: Sequence[Task], told: Callable[[int], None] = lambda number: None
    ) -> list[Verdict]:
        """A verdict for each task, in order.

        Args:
          told: called with the number of each task that is begun, from 1, by several threads.
        """
        verdicts: list[Verdict | None] = [None] * len(tasks)
        # One iterator that all threads draw from: a slow task holds up one worker alone.
        numbered = iter(list(enumerate(tasks)))

        def work(worker):
            for number, task in numbered:
                told(number + 1)
                verdicts[number] = worker.ask(task)

        busy = self._workers[: len(tasks)]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(busy))) as threads:
            for done in [threads.submit(work, worker) for worker in busy]:
                done.result()
        return verdicts

    def close(self):
        """Ends the workers."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@functools.cache
def shared_grader() -> Grader:
    """The pool of this process, for all that grade in it; ended with the process."""
    return Grader()


def _end(workers):
    for worker in workers:
        worker.end()


class _Worker:
    """One process: a line of JSON in, a line out."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._process = None

    def ask(self, task: Task) -> Verdict:
        if self._process is None:
            self._start()
        while self._read(0):  # said by a worker that died without a task
            pass
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(task)).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it died between two tasks
            self.end()
            return Verdict(False, "crash")
        line = self._read(self._seconds + GRACE_SECONDS)
        if line:
            return Verdict(**json.loads(line))
        self.end()
        return Verdict(False, "time" if line is None else "crash")

    def _start(self):
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(self._seconds), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group that ends as one
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        if not self._read(START_SECONDS):
            self.end()
            raise RuntimeError(
                "a grading worker did not start; try `python -m opd_jax.evaluation.grading_worker 5 0`"
            )

    def _read(self, seconds: float) -> bytes | None:
        """The next line; b"" where the process has ended, None past the limit."""
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def end(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
