"""Seconds that each phase of a step keeps the devices busy, learnt without waiting in the loop."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Self


class PhaseClock:
    """Times phases by when their result arrays become ready; a context manager.

    JAX dispatches ahead, so the clock of the training loop shows when work was asked for, not when
    it ran. Here a thread of its own waits for the arrays, in the order in which they were watched;
    a phase lasts from the later of its dispatch and the readiness of the phase before it. Watch a
    small result of each phase: an array lives until it has become ready.

    An array that was deleted or donated meanwhile, or whose computation failed, yields no time; its
    phase then counts towards the next one. The loop itself will meet the failure.

    Args:
      told: called with (step, phase) when the devices come to a phase, and with None when nothing that was
        watched is left to do; by the thread, which waits meanwhile.
    """

    def __init__(self, told: Callable[[tuple[int, str] | None], None] = lambda now: None) -> None:
        self._told = told
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: dict[int, int] = {}  # step -> phases not ready yet
        self._seconds: dict[int, dict[str, float]] = {}
        self._thread = threading.Thread(target=self._work, name="phase-clock", daemon=True)
        self._thread.start()

    def watch(self, phase: str, step: int, array: Any) -> None:
        """Notes that `array`, just dispatched, is a result of `phase`; returns at once."""
        with self._changed:
            self._pending[step] = self._pending.get(step, 0) + 1
        self._queue.put((phase, step, array, time.perf_counter()))

    def pop(self, step: int, timeout: float = 1.0) -> dict[str, float]:
        """Returns {phase: seconds} of a step and forgets it and the steps before it.

        Call it once the step's metrics have been read: its arrays are ready then, and this only
        lets the thread catch up. What is not ready within `timeout` seconds is left out.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending.get(step), timeout)
            result = self._seconds.get(step, {})
            for old in [s for s in self._seconds if s <= step]:
                del self._seconds[old]
            return result

    def _work(self) -> None:
        previous_ready = float("-inf")
        while (item := self._queue.get()) is not None:
            phase, step, array, dispatched = item
            self._told((step, phase))
            try:
                array.block_until_ready()
                ready = time.perf_counter()
            except Exception:
                ready = None
            del array, item  # do not keep a buffer alive while waiting for the next
            with self._changed:
                if ready is not None:
                    phases = self._seconds.setdefault(step, {})
                    seconds = ready - max(previous_ready, dispatched)
                    phases[phase] = phases.get(phase, 0.0) + seconds
                    previous_ready = ready
                self._pending[step] -= 1
                if not self._pending[step]:
                    del self._pending[step]
                self._changed.notify_all()
            if self._queue.empty():
                self._told(None)
        self._told(None)

    def close(self) -> None:
        """Ends the thread, once everything watched is ready."""
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
