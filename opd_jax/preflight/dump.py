"""Reads programs from the compiler's dump after optimisation and buffer assignment.

Code generation is the longest part of compiling a large program. Preflight would learn from it only the size
of the code and its errors. `--stop_after=buffers` starts a process for each program and kills it before code
generation.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from opd_jax.errors import UserError
from opd_jax.preflight.build import Built, shortage

OPTIMISED, BUFFERS, LAST = (
    "*after_optimizations.txt",
    "*after_optimizations-buffer-assignment.txt",
    "*after_optimizations-memory-usage-report.txt",  # written after both
)


def options(folder) -> dict:
    """Options that make the compiler dump to a folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def read(folder) -> Built:
    """Reads the program that was dumped to a folder; no number includes the size of its code.

    Raises:
      UserError: the folder holds no dump.
    """
    text, buffers = (next(Path(folder).glob(name), None) for name in (OPTIMISED, BUFFERS))
    if text is None or buffers is None:
        raise UserError(f"--from_dump: {folder} holds no {BUFFERS[1:]}; write it with --stop_after=buffers")
    arguments = temporaries = host = 0
    for size, kind in re.findall(r"^allocation \d+: size (\d+)(.*)$", buffers.read_text(), re.MULTILINE):
        host += int(size) * ("parameter" in kind and "color 5" in kind)
        if re.search(r"color [1-9]", kind):  # memory on the chip, or the host's
            continue
        arguments += int(size) * ("parameter" in kind)
        temporaries += int(size) * ("parameter" not in kind)
    return Built(arguments, temporaries, arguments + temporaries, host, text.read_text())


def reader(folder):
    """A build(traced, name) for `check.check` that reads FOLDER/NAME."""
    return lambda traced, name: read(Path(folder) / name)


def only(wanted: str, folder):
    """A build(traced, name) that compiles one program with a dump in FOLDER/NAME, and skips the others.

    It turns off the compilation cache of this process, because a program from the cache writes no dump.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()

    def build(traced, name):
        if name != wanted:
            return Built()
        traced.lower().compile(compiler_options=options(Path(folder) / name))
        return Built()

    return build


def until_buffers(folder, arguments):
    """A build(traced, name) that runs preflight in a process of its own, up to buffer assignment.

    Args:
      arguments: the command line of this process.
    """

    def build(traced, name):
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("*after_optimizations*"):
            old.unlink()
        again = [sys.executable, "-m", "opd_jax.preflight", *arguments, f"--only={name}", f"--dump={folder}"]
        with open(target / "log", "w") as log:
            child = subprocess.Popen(again, stdout=log, stderr=log)
            while child.poll() is None and not any(target.glob(LAST)):
                time.sleep(1)
            child.kill()
            child.wait()
        if any(target.glob(LAST)):
            return read(target)
        said = (target / "log").read_text()
        if "RESOURCE_EXHAUSTED" in said:
            return Built(shortage=shortage(said))
        line = (said.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{name} was not compiled ({line}); see {target / 'log'}")

    return build
