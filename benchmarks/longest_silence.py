"""Measures the longest time for which a command prints nothing, as a reader of its log would see it.

    python benchmarks/longest_silence.py make demo

Runs the command with standard output and standard error in one pipe, so that it has no terminal. Prints each
line with the seconds since the start, and at the end the three longest silences with the lines around them.
The time before the first line and after the last one counts. Exits with the command's status.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

START, END = "(the start)", "(the end)"


class Silence(NamedTuple):
    """Seconds without output between two lines."""

    seconds: float
    before: str
    after: str


def silences(lines: Sequence[tuple[float, str]], end: float) -> list[Silence]:
    """The silences of a command, the longest first.

    Args:
      lines: each line as (seconds since the start, text), in order.
      end: seconds from the start to the end of the command.
    """
    events = [(0.0, START), *lines, (end, END)]
    found = [Silence(b - a, before, after) for (a, before), (b, after) in itertools.pairwise(events)]
    return sorted(found, key=lambda silence: -silence.seconds)


def main(command: Sequence[str]) -> int:
    """Runs the command and prints its silences; returns its exit status, or 128 + N if signal N ended it."""
    if not command:
        print(__doc__.splitlines()[2].strip().replace("make demo", "COMMAND"), file=sys.stderr)
        return 2
    started, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            lines.append((time.monotonic() - started, text))
            print(f"{lines[-1][0]:8.1f}  {text}", flush=True)
    end = time.monotonic() - started
    print(f"\n{' '.join(command)}: {end:.1f} s, status {process.returncode}")
    for silence in silences(lines, end)[:3]:
        print(f"silent for {silence.seconds:.1f} s\n  after  {silence.before}\n  before {silence.after}")
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
