"""Grades many answers in worker processes with a time limit per task, so that no answer can harm a run.

A worker that exceeds the limit, runs out of memory or crashes is replaced, and its task counts as not right.
Workers import neither JAX nor the caller's program.
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
from typing import IO

from opd_jax.data.prompts import generator_environment

SECONDS = 5.0
GRACE_SECONDS = 5.0  # after the limit, for the worker's own report
START_SECONDS = 120.0  # to start Python and sympy on a busy machine
MEMORY_BYTES = 4 << 30
WORKER = "opd_jax.evaluation.grading_worker"


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer to grade.

    Attributes:
      response: what the model wrote.
      answer: the reference answer.
      problem: (task, size, seed, index) of a reasoning-gym generator whose scorer decides, else None.
    """

    response: str
    answer: str
    problem: tuple[str, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The grade of one answer.

    Attributes:
      right: the answer equals the reference.
      failed: why it was not graded: "time", "crash" or "error"; "" if it was.
    """

    right: bool
    failed: str = ""


class Grader:
    """A pool of worker processes that start at the first use and end with this object.

    Args:
      workers: how many; by default one per core, at most 8.
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
          told: called with the number of each task as it begins, from 1, by several threads.
        """
        verdicts: dict[int, Verdict] = {}
        # All threads draw from one iterator, so that a slow task delays only one worker.
        numbered = iter(list(enumerate(tasks)))

        def work(worker):
            for number, task in numbered:
                told(number + 1)
                verdicts[number] = worker.ask(task)

        busy = self._workers[: len(tasks)]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(busy))) as threads:
            for done in [threads.submit(work, worker) for worker in busy]:
                done.result()
        return [verdicts[number] for number in range(len(tasks))]

    def close(self):
        """Ends the workers."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@functools.cache
def shared_grader() -> Grader:
    """The pool that all graders in this process share; it ends with the process."""
    return Grader()


def _end(workers):
    for worker in workers:
        worker.end()


class _Worker:
    """One worker process, which answers each line of JSON with a line of JSON."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task) -> Verdict:
        tasks, verdicts = _pipes(self._process or self._start())
        while _read(verdicts, 0):  # written by a worker that died between tasks
            pass
        try:
            tasks.write(json.dumps(dataclasses.asdict(task)).encode() + b"\n")
            tasks.flush()
        except BrokenPipeError:  # it died between two tasks
            self.end()
            return Verdict(False, "crash")
        line = _read(verdicts, self._seconds + GRACE_SECONDS)
        if line:
            return Verdict(**json.loads(line))
        self.end()
        return Verdict(False, "time" if line is None else "crash")

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(self._seconds), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that the whole group can be killed
            env=generator_environment(),  # problems of a generator are graded by number
        )
        if not _read(_pipes(process)[1], START_SECONDS):
            self.end()
            raise RuntimeError(
                "a grading worker did not start; try `python -m opd_jax.evaluation.grading_worker 5 0`"
            )
        return process

    def end(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """A worker's standard input and output."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a grading worker was started without pipes")
    return process.stdin, process.stdout


def _read(lines: IO[bytes], seconds: float) -> bytes | None:
    """The next line; b"" if the worker has ended, None if the time limit has passed."""
    ready, _, _ = select.select([lines], [], [], seconds)
    return lines.readline() if ready else None
