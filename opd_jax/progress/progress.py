"""What a command shows while it works: a bar on a terminal, elsewhere a line at least every 30 s.

    with Progress() as progress:
        progress.expect("step", 24, seconds=12)  # pieces of work, and the estimate for each
        with progress.phase("reading the prompts"):
            ...

A `phase` is what the command does now. A piece of `work` is part of a plan, from which the time left is
computed. A thread shows both. It reads a clock twice a second and uses no device.
"""

import contextlib
import dataclasses
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

from tqdm import tqdm

from opd_jax.progress.time_left import Plan

QUIET = 25.0  # seconds without a line, after which one says what is in progress
LONG = 20.0  # a phase that took less than this the last time begins without a line
SOON = 2.0  # a phase that ends sooner than this has no line
TICK = 0.5
REDRAWN = 0.1  # seconds between two drawings of the bar


@dataclasses.dataclass(eq=False)
class _Phase:
    """Something in progress.

    Attributes:
      label: what is shown.
      kind: key under which its duration is remembered.
      started: when it began, by the clock of Progress.
      part_started: when its current part began.
      part: number of that part, from 1; 0 without parts.
      parts: how many parts it has.
      announced: a line has named it.
      compiling: it is a compilation, which does not count as time of a piece of work.
    """

    label: str
    kind: str
    started: float
    part_started: float
    part: int = 0
    parts: int = 0
    announced: bool = False
    compiling: bool = False


class Progress:
    """Shows what a command does and how long it will take; a context manager.

    Only one thread may enter phases. In a run of several processes only process 0 shows anything.

    Args:
      stream: where the text goes; standard error by default.
      active: whether to show anything; by default, whether this is process 0.
      clock: returns monotonic seconds.
      thread: whether a thread calls `beat`; otherwise the caller does.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        active: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        thread: bool = True,
    ):
        self._stream = stream or sys.stderr
        self._clock = clock
        self._closed = not (_first_process() if active is None else active)
        self._terminal = self._stream.isatty()
        self._lock = threading.RLock()
        self._phases: list[_Phase] = []
        self._device: _Phase | None = None
        self._titles: list[str] = []
        self._took: dict[str, float] = {}
        self._plan = Plan()
        self._since = self._said = self._stepped = clock()
        self._compiling = self._compiled_before = 0.0
        self._programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._bar: tqdm | None = None
        self._drawn, self._reached, self._summary, self._counted = 0.0, 0, "", ""
        self._stop = threading.Event()
        self._thread = None
        if thread and not self._closed:
            self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
            self._thread.start()

    # ---- What is in progress.

    @contextlib.contextmanager
    def phase(self, label: str, *, kind: str | None = None, parts: int = 0) -> Iterator[None]:
        """Shows what is done inside the context, such as "reading the student's weights".

        Args:
          label: what is shown; with parts, "2 of 6" follows it.
          kind: key under which its duration is remembered; the label by default.
          parts: how many parts it has; `at` says which one is current.
        """
        with self._phase(label, kind, parts):
            yield

    @contextlib.contextmanager
    def _phase(self, label, kind=None, parts=0, compiling=False) -> Iterator[_Phase]:
        now = self._clock()
        entered = _Phase(label, kind or label, now, now, int(parts > 0), parts, compiling=compiling)
        with self._lock:
            self._phases.append(entered)
        try:
            yield entered
        finally:
            with self._lock:
                self._phases.remove(entered)
                self._took[entered.kind] = self._clock() - entered.started

    def at(self, part: int) -> None:
        """The innermost phase begins this part, counted from 1. Any thread may call it."""
        with self._lock:
            phase, now = self._phases[-1], self._clock()
            if phase.part < part <= phase.parts:
                phase.announced &= now - phase.part_started < LONG
                phase.part, phase.part_started = part, now

    @contextlib.contextmanager
    def compiling(self, what: str, program: Any, *shape: Any) -> Iterator[None]:
        """Goes around a call of a jitted program; shows a phase at the first call with this shape."""
        known = self._programs.setdefault(program, set())
        if shape in known:
            yield
            return
        with self._phase(f"compiling {what}", compiling=True) as phase:
            yield
        known.add(shape)
        with self._lock:
            seconds = self._clock() - phase.started
            self._compiling += seconds
            self._since += seconds

    def device(self, label: str | None, kind: str = "") -> None:
        """Says what the device does from now on, for a thread that waits; shown if there is no phase."""
        with self._lock:
            now = self._clock()
            if self._device is not None:
                self._took[self._device.kind] = now - self._device.started
            self._device = None if label is None else _Phase(label, kind or label, now, now)

    @contextlib.contextmanager
    def titled(self, title: str) -> Iterator[None]:
        """Puts a title before all phases and steps inside the context, such as the name of a run."""
        self._titles.append(title)
        try:
            yield
        finally:
            self._titles.pop()

    # ---- What is left to do.

    def expect(self, name: str, count: int = 1, seconds: float | None = None) -> None:
        """Plans `count` more pieces of work of one name, and sets the estimate for each if it is known.

        A count of 0 only sets the estimate. Measurements replace it.
        """
        with self._lock:
            self._plan.add(name, count)
            if seconds is not None:
                self._plan.of(name).foresee(seconds)

    def plan(self, work: Mapping[str, int]) -> None:
        """Plans pieces of work, name -> how many."""
        for name, count in work.items():
            self.expect(name, count)

    def skip(self, name: str, count: int = 1) -> None:
        """Removes pieces from the plan, because they are done already or not needed."""
        with self._lock:
            self._plan.add(name, -count)

    @contextlib.contextmanager
    def work(self, name: str, label: str, parts: int = 0) -> Iterator[None]:
        """One piece of planned work, shown as a phase. Its time does not include compiling."""
        with self._lock:
            started = self._since = self._clock()
            before = self._compiling
        with self._phase(label, name, parts):
            yield
        with self._lock:
            compiling = self._compiling - before
            self._took[name] = max(0.0, self._clock() - started - compiling)
            self.done(name, self._took[name])

    def done(self, name: str, seconds: float) -> None:
        """Records that one piece of planned work is done, and how long it took."""
        with self._lock:
            self._plan.done(name, seconds)
            self._since = self._clock()

    @property
    def worked(self) -> float:
        """Seconds of all pieces of work so far."""
        return self._plan.worked

    def left(self) -> float | None:
        """Seconds that the rest of the plan will take; None if most durations are unknown."""
        with self._lock:
            # The piece in progress is the innermost phase that is planned work, else a step.
            kinds = [phase.kind for phase in reversed(self._phases) if phase.kind in self._plan.pieces]
            compiling = self._phases and self._phases[-1].compiling
            until = self._phases[-1].started if compiling else self._clock()
            return self._plan.left(kinds[0] if kinds else "step", until - self._since)

    # ---- What is shown.

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line, to `file` if given (such as standard output), without breaking the bar."""
        with self._lock:
            if not self._closed:
                self._line(text, file)

    def step(
        self,
        number: int,
        total: int,
        text: str = "",
        *,
        seconds: float | None = None,
        busy: float | None = None,
        due: bool = True,
    ) -> None:
        """Records and shows a training step, which is one piece of "step".

        Args:
          text: the step's numbers.
          seconds: its duration; if None, the time since the last piece of work.
          busy: seconds for which the device worked; used instead if something was compiled during the step.
          due: whether to print a line if there is no bar. A line is also printed if the next would come too
            late.
        """
        with self._lock:
            now = self._clock()
            compiled = self._compiling - self._compiled_before
            self._compiled_before = self._compiling
            if seconds is None:
                seconds = now - self._since
            elif compiled:
                seconds = busy or max(0.0, seconds - compiled)
            self.done("step", seconds)
            if self._closed:
                return
            self._counted, self._summary = f"step {number}/{total}", text
            if self._terminal:
                self._draw(force=number == total)
            elif due or now - self._stepped + (self._plan.of("step").seconds or 0.0) > QUIET:
                self._stepped = now
                self._line("  ".join(filter(None, [self._title() + self._counted, text, self.left_text()])))

    def beat(self) -> None:
        """Shows what is due: the bar, or a line for a phase that has begun or takes long."""
        with self._lock:
            if self._closed:
                return
            if self._terminal:
                self._draw()
                return
            now = self._clock()
            phase = self._current()
            quiet = now - self._said >= QUIET
            if phase is None:
                if quiet:
                    self._line(self._with_left(self._title() + "working"))
                return
            takes, so_far = self._takes(phase), now - phase.started
            long = phase.compiling or takes is None or takes >= LONG
            begins = long and not phase.announced and so_far >= SOON
            if not begins and not quiet:
                return
            text = self._label(phase)
            if begins and phase.part_started == phase.started:
                text += f", takes about {_time(takes)}" if takes else ""
            else:
                text += f", {_time(so_far)} so far"
                text += f" of about {_time(takes)}" if takes and takes > so_far else ""
            phase.announced |= begins
            self._line(self._with_left(text))

    def _current(self) -> _Phase | None:
        return self._phases[-1] if self._phases else self._device

    def _takes(self, phase: _Phase) -> float | None:
        """Seconds of the phase, from the last time or the plan; if they were too short, from its parts."""
        planned = self._plan.pieces.get(phase.kind)
        takes = self._took.get(phase.kind, planned.seconds if planned else None)
        if phase.part_started > phase.started and (takes is None or takes < self._clock() - phase.started):
            return (phase.part_started - phase.started) / (phase.part - 1) * phase.parts
        return takes

    def _label(self, phase: _Phase) -> str:
        part = f" {phase.part} of {phase.parts}" if phase.parts else ""
        return f"{self._title()}{phase.label}{part}"

    def _title(self) -> str:
        return "".join(f"{title}: " for title in self._titles)

    def left_text(self) -> str:
        """The time left in words, such as "about 4:05 left"; "" if it is unknown."""
        seconds = self.left()
        if seconds is None:
            return ""
        return f"{'at least' if self._plan.partly_known else 'about'} {_time(seconds)} left"

    def _with_left(self, text: str) -> str:
        left = self.left_text()
        return f"{text}; {left} in all" if left else text

    def _line(self, text: str, file: TextIO | None = None) -> None:
        self._said = self._clock()
        file = file or self._stream
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print(text, file=file, flush=True)

    def _draw(self, force: bool = False) -> None:
        now = self._clock()
        if not force and now - self._drawn < REDRAWN:
            return
        self._drawn = now
        if self._bar is None:
            self._bar = tqdm(
                total=1000, file=self._stream, dynamic_ncols=True, leave=False, bar_format="{desc}"
            )
        phase, left = self._current(), self.left()
        label = self._title() + self._counted
        if phase is not None:
            label = f"{self._label(phase)} {_time(now - phase.started)}"
        bar = self._bar
        if left is not None:
            share = self.worked / (self.worked + left) if self.worked + left > 0 else 1.0
            self._reached = max(self._reached, round(1000 * share))
        bar.n, bar.leave = self._reached, bool(self._counted)
        bar.bar_format = "{desc}{postfix}"
        if left is not None:
            bar.bar_format = "{desc} |{bar:20}| {percentage:.0f}%{postfix}"
        bar.set_description_str(label[: max(20, (bar.format_dict["ncols"] or 100) - 30)], refresh=False)
        bar.set_postfix_str("  ".join(filter(None, [self.left_text(), self._summary])), refresh=False)
        bar.refresh()

    def _work(self) -> None:
        while not self._stop.wait(TICK):
            try:
                self.beat()
            except (OSError, ValueError):  # the stream is closed
                return

    def close(self) -> None:
        """Ends the thread; shows nothing from now on."""
        self._stop.set()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.close()
                self._bar = None
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def own(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress; if None, a new one for the length of the context."""
    if progress is not None:
        yield progress
    else:
        with Progress() as made:
            yield made


def _first_process() -> bool:
    """Whether this is process 0; uses no device if there is only one process."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
