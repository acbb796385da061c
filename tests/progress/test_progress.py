"""What is shown while a command works: by a clock that the test turns, so nothing here waits."""

import io
import itertools
import sys
import threading

import jax
import pytest

from opd_jax.progress import progress as progresses
from opd_jax.progress.progress import Progress, own
from opd_jax.run.phase_clock import PhaseClock


class Clock:
    """Seconds, as the test sets them."""

    now = 0.0

    def __call__(self):
        return self.now


class Log(io.StringIO):
    """A stream without a terminal that remembers when each line came."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.times = clock, []

    def write(self, text):
        self.times += [self.clock.now] * text.count("\n")
        return super().write(text)

    @property
    def lines(self):
        return self.getvalue().splitlines()


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines as a terminal shows them: a carriage return writes over what is there."""
        shown = []
        for line in self.getvalue().split("\n"):
            row = ""
            for part in line.split("\r"):
                row = part + row[len(part) :]
            shown.append(row.rstrip())
        return shown


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    return Log(clock)


@pytest.fixture
def shown(log, clock):
    with Progress(log, active=True, clock=clock, thread=False) as made:
        yield made


def pass_time(shown, clock, seconds):
    """Lets seconds pass, and has the progress shown as its thread does."""
    for _ in range(round(seconds / progresses.TICK)):
        clock.now += progresses.TICK
        shown.beat()


def longest_gap(log, end):
    times = [0.0, *log.times, end]
    return max(b - a for a, b in itertools.pairwise(times))


def test_a_long_phase_has_a_line_at_its_start_and_is_never_silent_for_half_a_minute(shown, log, clock):
    with shown.phase("reading the weights"):
        pass_time(shown, clock, 200)
    assert log.times[0] <= 3 and log.lines[0] == "reading the weights"
    assert log.lines[1] == "reading the weights, 0:27 so far"
    assert longest_gap(log, 200) < 30


def test_what_no_phase_covers_is_not_silent_either(shown, log, clock):
    pass_time(shown, clock, 100)
    assert log.lines == ["working"] * 4


def test_a_phase_that_ends_at_once_says_nothing(shown, log, clock):
    for _ in range(5):
        with shown.phase("compiling what is compiled already"):
            pass_time(shown, clock, 1)
    assert log.lines == []


def test_a_phase_known_to_be_short_begins_silently_and_one_known_to_be_long_says_how_long(shown, log, clock):
    for seconds in (10, 10, 40, 40):
        with shown.phase("sampling"):
            pass_time(shown, clock, seconds)
    assert log.lines == [
        "sampling",
        "sampling, 0:07 so far of about 0:10",  # the third, of which nobody knew that it is long
        "sampling, 0:32 so far",
        "sampling, takes about 0:40",
        "sampling, 0:27 so far of about 0:40",
    ]


def test_parts_are_counted_and_tell_how_long_the_whole_takes(shown, log, clock):
    with shown.phase("evaluating, batch", parts=3):
        for part in (1, 2, 3):
            shown.at(part)
            pass_time(shown, clock, 24)
    assert log.lines == [
        "evaluating, batch 1 of 3",
        "evaluating, batch 2 of 3, 0:24 so far of about 1:12",
        "evaluating, batch 3 of 3, 0:48 so far of about 1:12",
    ]
    assert shown.left() is None  # nothing was planned
    with shown.phase("evaluating, batch", parts=3):
        pass_time(shown, clock, 3)
    assert log.lines[-1] == "evaluating, batch 1 of 3, takes about 1:12"


def test_a_part_that_another_thread_is_past_already_counts_no_more(shown, log, clock):
    with shown.phase("grading response", parts=5):
        for part in (2, 4, 3, 9):
            shown.at(part)
        pass_time(shown, clock, 3)
    assert log.lines == ["grading response 4 of 5"]


def test_the_time_left_has_the_steps_and_the_evaluations_in_it(shown, clock):
    shown.expect("step", 10)
    shown.expect("evaluation", 2)
    assert shown.left() is None and shown.left_text() == ""
    shown.step(1, 10, seconds=8.0)
    assert (shown.left(), shown.left_text()) == (72.0, "at least 1:12 left")
    shown.done("evaluation", 30.0)
    assert (shown.left(), shown.left_text()) == (102.0, "about 1:42 left")
    clock.now += 5  # of the step that goes on
    assert shown.left() == 97.0
    clock.now += 50  # it takes longer than it should
    assert shown.left() == 94.0
    shown.skip("evaluation")
    assert shown.left() == 64.0


def test_what_is_foreseen_counts_until_it_is_measured_and_can_be_foreseen_anew(shown):
    shown.expect("step", 10, seconds=5.0)
    assert shown.left() == 50.0
    shown.done("step", 7.0)
    assert shown.left() == 63.0
    shown.expect("step", 0, seconds=2.0)
    assert shown.left() == 18.0


def test_the_first_measurement_is_forgotten_once_there_is_another(shown):
    shown.expect("step", 10)
    for seconds in (60.0, 5.0, 7.0):
        shown.done("step", seconds)
    assert shown.left() == 7 * 6.0


def test_compiling_is_announced_at_a_programs_first_call_and_counts_as_no_evaluation(shown, log, clock):
    program = jax.jit(lambda x: x)
    shown.expect("evaluation", 3)
    for _ in range(2):
        with shown.work("evaluation", "evaluating"):
            with shown.compiling("the sampler", program, 8):
                pass_time(shown, clock, 40 if not shown.worked else 0)
            pass_time(shown, clock, 10)
    assert next(line for line in log.lines if "compiling" in line) == "compiling the sampler"
    assert shown.worked == 20.0 and shown.left() == 10.0
    with shown.compiling("the sampler", program, 9):  # another width
        pass_time(shown, clock, 3)
    assert log.lines[-1].startswith("compiling the sampler")


def test_a_step_that_compiled_counts_with_the_time_of_the_devices(shown, clock):
    shown.expect("step", 3)
    with shown.compiling("the training step", jax.jit(lambda x: x)):
        clock.now += 50
    shown.step(1, 3, seconds=60.0, busy=12.0)
    assert shown.left() == 24.0


def test_slow_steps_have_a_line_each_and_fast_ones_every_few(shown, log, clock):
    shown.expect("step", 20)
    for step in range(1, 11):
        pass_time(shown, clock, 15)
        shown.step(step, 20, "loss 0.5", due=False)
    assert log.lines[-1] == "step 10/20  loss 0.5  about 2:30 left"
    assert len([line for line in log.lines if line.startswith("step")]) == 10
    for step in range(11, 21):
        pass_time(shown, clock, 1)
        shown.step(step, 20, "loss 0.5", due=step % 5 == 0)
    assert [line.split()[1] for line in log.lines[-2:]] == ["15/20", "20/20"]


def test_the_devices_work_is_shown_while_the_host_has_no_phase(shown, log, clock):
    shown.device("step 3/9: sampling", "sample")
    pass_time(shown, clock, 3)
    with shown.phase("saving"):
        pass_time(shown, clock, 3)
    shown.device("step 3/9: updating", "train")
    pass_time(shown, clock, 3)
    shown.device(None)
    assert log.lines == ["step 3/9: sampling", "saving", "step 3/9: updating"]


def test_a_clock_of_phases_tells_what_the_devices_do_in_their_order():
    told = []
    with PhaseClock(told.append) as clock:
        clock.watch("sample", 1, jax.numpy.zeros(()))
        clock.watch("train", 1, jax.numpy.zeros(()))
        clock.pop(1)
    assert [now for now in told if now] == [(1, "sample"), (1, "train")]
    assert told[-1] is None


def test_titles_stand_before_phases_and_steps(shown, log, clock):
    with shown.titled("2/6 release"), shown.phase("reading the prompts"):
        pass_time(shown, clock, 3)
        shown.step(1, 4)
    assert log.lines == ["2/6 release: reading the prompts", "2/6 release: step 1/4"]


def test_a_closed_progress_and_one_of_another_process_say_nothing(log, clock):
    closed = Progress(log, active=True, clock=clock, thread=False)
    closed.close()
    for made in (closed, Progress(log, active=False, clock=clock, thread=False)):
        with made.phase("compiling"):
            made.step(1, 2)
            made.say("a line")
            pass_time(made, clock, 60)
    assert log.lines == []


def test_only_process_0_of_a_pod_shows_anything(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with Progress(stream) as made:
        made.say("a line")
    assert stream.getvalue() == "" and not progress_threads()


def progress_threads():
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_the_thread_ends_with_the_progress_whatever_happens():
    with pytest.raises(RuntimeError), Progress(io.StringIO()):
        assert len(progress_threads()) == 1
        raise RuntimeError
    assert not progress_threads()


def test_a_stream_that_is_gone_ends_no_run(clock):
    stream = Log(clock)
    made = Progress(stream, active=True, clock=clock, thread=False)
    stream.close()
    clock.now = 100
    made._stop.wait = lambda seconds: False
    made._work()  # the thread's own loop; it ends


def test_a_callers_progress_is_not_closed_and_none_gives_one_of_its_own(shown, log, monkeypatch):
    with own(shown) as same:
        assert same is shown
    shown.say("a line")
    assert log.lines == ["a line"]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with own(None) as made:
        assert made is not shown and progress_threads()
    assert not progress_threads()


def test_a_terminal_has_one_bar_with_phase_share_and_time_left(clock):
    stream = Terminal()
    with Progress(stream, active=True, clock=clock, thread=False) as made:
        made.expect("step", 4)
        made.step(1, 4, "loss 0.7", seconds=30.0)
        made.device("step 2/4: sampling", "sample")
        pass_time(made, clock, 12)
        row = stream.screen()[-1]
        assert row.startswith("step 2/4: sampling 0:12 |") and "28%" in row
        assert row.endswith("about 1:18 left  loss 0.7")
        made.say("a line")
        assert stream.screen()[-2] == "a line"
    assert stream.getvalue().endswith("\n")


def test_a_bar_without_a_step_leaves_nothing_behind(clock):
    stream = Terminal()
    with Progress(stream, active=True, clock=clock, thread=False) as made, made.phase("reading"):
        pass_time(made, clock, 3)
        assert stream.screen()[-1] == "reading 0:03"
    assert stream.screen()[-1] == ""


def test_lines_are_whole_while_a_thread_draws_the_bar():
    stream = Terminal()
    with Progress(stream, active=True, thread=False) as made:
        made.expect("step", 100, seconds=1.0)
        stop = threading.Event()

        def draw():
            while not stop.is_set():
                with made._lock:
                    made._draw(force=True)

        drawing = threading.Thread(target=draw)
        drawing.start()
        for number in range(300):
            made.say(f"line {number}")
        stop.set()
        drawing.join()
    rows = stream.screen()
    assert [row for row in rows if row.startswith("line")] == [f"line {number}" for number in range(300)]
