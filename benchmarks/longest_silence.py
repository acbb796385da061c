"""How long a command says nothing: its longest time without output, as somebody sees it who reads its log.

    python benchmarks/longest_silence.py make demo

Runs the command with standard output and standard error in one pipe, so it sees no terminal, and prints each
line with the seconds since the start. At the end it prints the three longest silences and the lines around
them; the time before the first line and after the last counts. Ends with the command's exit status.
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
    """The silences of a command that started at 0, the longest first.

    Args:
      lines: (seconds since the start, text) of each line, in order.
      end: when the command ended, seconds since the start.
    """
    events = [(0.0, START), *lines, (end, END)]
    found = [Silence(b - a, before, after) for (a, before), (b, after) in itertools.pairwise(events)]
    return sorted(found, key=lambda silence: -silence.seconds)


def main(command: Sequence[str]) -> int:
    """Runs the command and prints its silences; returns its exit status, 128 + N where signal N ended it."""
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
