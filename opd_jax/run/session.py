"""A run while it goes on in its workdir: its state, its records, and a request to stop."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

import jax

from opd_jax.distill import TrainState
from opd_jax.errors import UserError, reason
from opd_jax.parallel import distributed
from opd_jax.progress import Progress
from opd_jax.run.checkpoint import DAMAGED, Checkpoints
from opd_jax.run.metrics import MetricWriter

LOCK = ".lock"


def due(config: Any, every: int, step: int) -> bool:
    """Whether what happens every so many steps happens after this one; the last step always counts."""
    return every > 0 and (step % every == 0 or step == config.train.steps)


class Session:
    """Continues or starts a run; a context manager.

    Args:
      config: the whole config.
      workdir: folder of the run.
      progress: shows what goes on.

    Attributes:
      done: steps of the checkpoint that the run continues from; None for a new run.
      writer: its MetricWriter, after `record`.
      skipped: updates that were skipped in a row before the session, after `record`.
    """

    writer: MetricWriter
    skipped: int

    def __init__(self, config: Any, workdir: Any, progress: Progress):
        self._config, self._workdir, self._progress = config, workdir, progress

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_lock(Path(self._workdir)))
            self._checkpoints = Checkpoints(self._workdir, self._config.checkpoint.keep)
            stack.callback(self._close)
            self.done, damaged = None, {}
            if self._checkpoints.latest is not None:
                with self._progress.phase("checking the newest checkpoint"):
                    self.done, damaged = self._checkpoints.newest_whole()
            if damaged and self.done is None:
                raise UserError(
                    f"--workdir={self._workdir} has no whole checkpoint left (step {max(damaged)}:"
                    f" {damaged[max(damaged)]}); restore one into checkpoints/, or start in another folder"
                )
            for step, wrong in damaged.items():
                self._progress.say(
                    f"the checkpoint of step {step} is damaged: {wrong}; it is in {DAMAGED}/{step}"
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> bool | None:
        return self._stack.__exit__(*exc_info)

    def _close(self) -> None:
        with self._progress.phase("writing what is left of the checkpoint"):
            self._checkpoints.close()

    @property
    def first(self) -> int:
        """Steps done when the session began."""
        return self.done or 0

    def state(
        self, start: Callable[[], TrainState], abstract: Callable[[], TrainState]
    ) -> tuple[TrainState, dict | None]:
        """(the newest checkpoint's state, or the start's; the position in the prompts, None at the start).

        Args:
          start: reads the state before the first step.
          abstract: shapes, dtypes and shardings of a state.
        """
        if self.done is None:
            with self._progress.phase("reading the student's weights"):
                return start(), None
        with self._progress.phase(f"reading the checkpoint of step {self.done}"):
            return self._checkpoints.restore(self.done, abstract())

    def record(self, plain_every: int = 10) -> MetricWriter:
        """Opens the run's records, dropping those after the checkpoint; from here on SIGTERM stops the loop.

        Args:
          plain_every: as the MetricWriter's.

        Raises:
          UserError: in all processes, if process 0 cannot open them.
        """
        self._preemption = self._stack.enter_context(distributed.Preemption())
        writer = self._opened(plain_every)
        self.writer = self._stack.enter_context(writer)
        self.skipped = int(distributed.gathered([writer.skipped])[0, 0])
        return writer

    def _opened(self, plain_every: int) -> MetricWriter:
        writer, failed = None, None
        try:
            writer = MetricWriter(self._config, self._workdir, self.done, self._progress, plain_every)
        except OSError as error:
            failed = UserError(
                f"--workdir={self._workdir}: the run's records can't be opened ({reason(error)}); make room"
                " or restore access, and start again"
            )
        except UserError as error:
            failed = error
        if distributed.gathered([failed is not None]).any() or writer is None:
            raise failed or UserError("process 0 can't open the run's records; it says why")
        return writer

    def recorded(self, kinds: Iterable[tuple[str, str | None]]) -> set[tuple[str, str | None]]:
        """Which of these (kind, benchmark or None) process 0 found recorded of the step `done`."""
        kinds = list(kinds)
        found = distributed.gathered([kind in self.writer.recorded for kind in kinds])[0]
        return {kind for kind, there in zip(kinds, found, strict=True) if there}

    def stopping(self) -> bool:
        """Whether the run was told to stop after this step. Call it at every step, in every process."""
        return self._preemption.reached()

    def saves(self, step: int, stopping: bool) -> bool:
        """Whether this step is saved."""
        every = self._config.checkpoint.every
        return due(self._config, every, step) or (stopping and every > 0)

    def save(self, step: int, state: TrainState, position: dict, kl: float | None = None) -> None:
        """Saves a step in the background, after its records are on the disk.

        Raises:
          UserError: in all processes, if process 0 cannot write its records.
        """
        self.sync()
        with self._progress.phase(f"saving step {step}", kind="saving"):
            self._checkpoints.save(step, state, position, kl)

    def sync(self) -> None:
        """Puts the run's records on the disk. Call it in every process.

        Raises:
          UserError: in all processes, if process 0 cannot write them.
        """
        try:
            failed = None
            self.writer.sync()
        except UserError as error:
            failed = error
        if distributed.gathered([failed is not None]).any():
            raise failed or UserError("process 0 can't write the run's records; it says why")

    def stop(self, step: int) -> NoReturn:
        """Ends the run after a step, with its exit status.

        Raises:
          distributed.Preempted: unless process 0 cannot write the run's records.
          UserError: in all processes, in that case.
        """
        self.sync()
        self.writer.say(f"told to stop after step {step}; start again with the same --workdir to continue")
        raise distributed.Preempted


@contextlib.contextmanager
def _lock(workdir: Path):
    """Keeps other processes from running in the same folder; the system unlocks it when this one ends.

    Process 0 holds the lock; call it in every process.

    Raises:
      UserError: in all processes, if another run has it.
    """
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(_held(workdir)) if jax.process_index() == 0 else ""
        if distributed.gathered([bool(refused)]).any():
            raise UserError(refused or f"--workdir={workdir} can't be used; process 0 says why")
        yield


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[str]:
    """Holds the lock; yields why it cannot, or ""."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        yield f"--workdir={workdir}: {LOCK} can't be written ({error.strerror}); choose another folder"
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "of another run"
            yield f"--workdir={workdir}: process {owner} is running there; wait, or take another folder"
            return
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield ""


class StepReader:
    """Writes the metrics of a step after the next one is on its way, so that the device never waits.

    Args:
      writer: where they go.
      config: the whole config; reads train.max_skips and train.updates_per_rollout.
      skipped: updates skipped in a row before, as `Session.skipped`.
    """

    def __init__(self, writer: MetricWriter, config: Any, skipped: int = 0):
        self._writer, self._config = writer, config
        self._pending, self._skipped = None, skipped
        self.restart()

    def restart(self) -> None:
        """Starts the clock of the next step now: what came before was no training."""
        self._last = time.perf_counter()

    @property
    def step(self) -> int | None:
        """The step whose metrics are pending, if any are."""
        return self._pending and self._pending[0]

    def begin(self, step: int, measured: dict, more: Callable[[], dict] = dict) -> None:
        """Keeps a step's metrics on the devices; once they are there, `more` returns what else to record."""
        self._pending = step, measured, more

    def finish(self) -> None:
        """Fetches and writes what is pending; waits for the devices only if they are not done yet.

        Raises:
          UserError: more than train.max_skips updates in a row were skipped.
        """
        if self._pending is None:
            return
        step, measured, more = self._pending
        self._pending = None
        record = jax.device_get(measured)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        speed = {
            "tokens_per_second": float(record["response_tokens"]) / seconds,
            "seconds_step": seconds,
        }
        self._writer.write({"kind": "train", "step": step} | record | speed | more())
        train, skipped = self._config.train, int(record["skipped_updates"])
        self._skipped = self._skipped + skipped if skipped == train.updates_per_rollout else 0
        if self._skipped > train.max_skips:
            raise UserError(
                f"step {step}: the loss or the gradient was not finite in {self._skipped} updates in a row,"
                f" more than train.max_skips={train.max_skips}; the last checkpoint is kept. Lower"
                " optimizer.learning_rate or optimizer.clip_norm, and look at the data"
            )
