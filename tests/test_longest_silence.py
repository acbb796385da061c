"""The script that measures how long a command says nothing."""

import subprocess
import sys
from pathlib import Path

from opd_jax.config.recipes import load_module

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "longest_silence.py"


def test_silences_are_between_lines_and_at_both_ends_the_longest_first():
    found = load_module(str(SCRIPT)).silences([(2.0, "a"), (3.0, "b"), (10.0, "c")], 15.0)
    assert [(s.seconds, s.before, s.after) for s in found] == [
        (7.0, "b", "c"),
        (5.0, "c", "(the end)"),
        (2.0, "(the start)", "a"),
        (1.0, "a", "b"),
    ]


def test_it_shows_both_streams_of_the_command_and_keeps_its_exit_status():
    command = "echo one; echo two >&2; test -t 1 || echo no terminal; exit 3"
    done = subprocess.run(
        [sys.executable, SCRIPT, "sh", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    said = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()[:3]]
    assert said == ["one", "two", "no terminal"]
    assert "silent for" in done.stdout


def test_a_command_that_a_signal_ends_has_the_shells_status_for_it():
    command = [sys.executable, SCRIPT, "sh", "-c", "kill -9 $$"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 128 + 9


def test_without_a_command_it_says_how_to_call_it():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "python benchmarks/longest_silence.py COMMAND\n")
