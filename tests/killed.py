"""Runs a module that is killed at a chosen moment, as by a power cut: no handler, no clean-up.

    python -m tests.killed EVENT TEXT MODULE [ARGUMENT...]

EVENT is one of Python's audit events, such as os.rename, and comes just before what it names; TEXT is in its
arguments. EVENT "line" is half a line of metrics.jsonl written, of the first record that holds TEXT.
"""

import json
import os
import runpy
import signal
import sys

from opd_jax.run.metrics import METRICS_FILE, MetricWriter


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def tear_line(text: str):
    """Has the process killed in the middle of a line."""
    append = MetricWriter._append

    def torn(self, name, plain):
        line = json.dumps(plain)
        if name == METRICS_FILE and text in line:
            self._files[name].write(line[: len(line) // 2])
            self._files[name].flush()
            kill()
        append(self, name, plain)

    MetricWriter._append = torn


def main():
    _, event, text, module, *arguments = sys.argv
    if event == "line":
        tear_line(text)
    else:
        sys.addaudithook(lambda name, about: kill() if name == event and text in str(about) else None)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
