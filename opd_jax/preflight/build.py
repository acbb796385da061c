"""A traced program, compiled for devices that need not be attached."""

import dataclasses
import re

import jax

from opd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program: bytes of one device, and its optimised text.

    Attributes:
      arguments, temporaries, peak: as ProgramReport has them.
      host: bytes of the arguments that lie in the host's memory; in none of the above.
      text: what hlo.Program reads.
      shortage: what the compiler said where it found no room, else "".
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    host: int = 0
    text: str = ""
    shortage: str = ""


def built(traced, name: str) -> Built:
    """Compiles a traced program; preflight_dump.py has others of this signature.

    Raises:
      UserError: the compiler refuses it for another reason than memory.
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
    # The compiler's peak counts the host's memory too, whose results lie where the arguments did.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    return Built(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak + memory.generated_code_size_in_bytes,
        memory.host_argument_size_in_bytes,
        compiled.as_text(),
    )


def shortage(message: str) -> str:
    """What the compiler's out-of-memory message says, in a line."""
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if found:
        return f"needs {found[1]} of {found[2]}"
    found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    line = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    return f"needs {found[1]} of {found[2]}" if found else line
