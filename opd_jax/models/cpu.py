"""The CPU of this machine: its name, its instructions, and the speed of its matrix products."""

import dataclasses
import functools
import os
import platform
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from opd_jax.models import bf16_products

# Rows, inputs and outputs of the product that `probe` times.
PROBED = 1024, 1024, 1024
LEAST_GAIN = 1.2  # speed-up below which rounding is not worth it: two measurements of one rate differ as much
CPU_FILE = Path("/proc/cpuinfo")
# Flags of vector instructions, the widest first.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Speed of each kind of matrix product on this machine.

    Attributes:
      float32, bfloat16: FLOP/s with float32 operands, and with operands rounded to bfloat16.
      instructions: whether the CPU lists bfloat16 instructions; None if it lists no instructions.
    """

    float32: float
    bfloat16: float
    instructions: bool | None

    @property
    def choice(self) -> str:
        """The value of ModelConfig.products: bfloat16 if the CPU has the instructions and they are faster."""
        faster = self.bfloat16 >= LEAST_GAIN * self.float32
        return "bfloat16" if faster and self.instructions is not False else "compute"

    def record(self) -> dict[str, float | bool | None]:
        """The measurement for a run's versions.json, in GFLOP/s."""
        return {
            "float32_products_gflops": round(self.float32 / 1e9, 1),
            "bfloat16_products_gflops": round(self.bfloat16 / 1e9, 1),
            "bfloat16_instructions": self.instructions,
        }


@functools.cache
def probe(repeats: int = 5) -> Probe:
    """Times both kinds of product in turn, best of `repeats`; once per process, in about 0.25 seconds."""
    rows, inputs, outputs = PROBED
    cpu = jax.local_devices(backend="cpu")[0]
    x, weight = (jax.device_put(jnp.ones(shape), cpu) for shape in ((rows, inputs), (inputs, outputs)))
    kinds = {"float32": (jax.jit(jnp.matmul), weight)}
    # The sampler keeps its weights in bfloat16.
    kinds["bfloat16"] = jax.jit(bf16_products.product), weight.astype(jnp.bfloat16)
    seconds = dict.fromkeys(kinds, float("inf"))
    for repeat in range(repeats + 1):  # the first compiles
        for kind, (multiply, operand) in kinds.items():
            started = time.perf_counter()
            jax.block_until_ready(multiply(x, operand))
            if repeat:
                seconds[kind] = min(seconds[kind], time.perf_counter() - started)
    rates = {kind: 2 * rows * inputs * outputs / value for kind, value in seconds.items()}
    return Probe(**rates, instructions=has_instructions())


def has_instructions() -> bool | None:
    """Whether the CPU lists bfloat16 instructions (AVX512_BF16, AMX, Arm's BF16); None if unknown."""
    found = _listed("flags|Features")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found.split())) if found else None


def name() -> str:
    """The machine in words: the cores of this process, the CPU's name, its widest vector instructions."""
    flags = set(_listed("flags|Features").split())
    vectors = next((label for flag, label in VECTORS.items() if flag in flags), "")
    model = _listed("model name") or platform.processor() or platform.machine()
    model = re.sub(r"\((?:R|TM)\)|\bCPU\b|@.*", "", model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(part for part in (f"{cores} cores of {' '.join(model.split())}", vectors) if part)


def _listed(field: str) -> str:
    """The first value of a field in the system's list of CPUs; "" if there is none."""
    text = CPU_FILE.read_text(encoding="utf-8") if CPU_FILE.is_file() else ""
    found = re.search(rf"^(?:{field})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
