"""Which tests are slow: the functions that took long, all their cases together, from a run's own durations.

    make test ARGS="--durations=0 --durations-min=0.3" > test.log
    python -m tests.slow test.log > tests/slow.txt

tests/conftest.py marks them.
"""

import collections
import re
import sys
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
SECONDS = 4.0
LINE = re.compile(r"([\d.]+)s (?:setup|call|teardown) +(\S+?::\w+)(?:\[.*\])?\s*$")


def functions(log: str) -> list[str]:
    """The slow tests of a pytest log with durations, as FILE::FUNCTION."""
    seconds: collections.Counter[str] = collections.Counter()
    for line in log.splitlines():
        if found := LINE.match(line):
            seconds[found[2]] += float(found[1])
    return sorted(name for name, total in seconds.items() if total >= SECONDS)


if __name__ == "__main__":
    print(*functions(Path(sys.argv[1]).read_text(encoding="utf-8")), sep="\n")
