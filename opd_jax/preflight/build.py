"""Compiles a traced program for devices that need not be attached."""

import dataclasses
import re

import jax

from opd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program: its memory in bytes on one device, and its optimised text.

    Attributes:
      arguments, temporaries, peak: as in reports.ProgramReport.
      host: bytes of arguments in the host's memory; not part of the above.
      text: optimised HLO, which hlo.Program reads.
      shortage: the compiler's message if the memory does not suffice, else "".
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    host: int = 0
    text: str = ""
    shortage: str = ""


def built(traced, name: str) -> Built:
    """Compiles a traced program; dump.py has other functions with this signature.

    Raises:
      UserError: the compiler refuses it for a reason other than memory.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(
                f"{name} cannot be compiled for this slice ({str(error).splitlines()[0]}); try another mesh "
                "(mesh.tensor), or attention.kernel=plain"
            ) from error
        return Built(shortage=shortage(str(error)))
    memory = compiled.memory_analysis()
    # The compiler's peak includes the host's memory, in which results take the place of the arguments.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    return Built(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak + memory.generated_code_size_in_bytes,
        memory.host_argument_size_in_bytes,
        compiled.as_text(),
    )


def shortage(message: str) -> str:
    """The compiler's out-of-memory message in one line."""
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if found:
        return f"needs {found[1]} of {found[2]}"
    found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    line = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    return f"needs {found[1]} of {found[2]}" if found else line
