"""Matrix products of float32 arrays, operands in bfloat16 and sums in float32, and gradients of that kind.

A CPU with bfloat16 instructions (AVX512_BF16, AMX) may do them faster than in float32; `probe` finds out.
Only operands are rounded: activations, residual stream, norms, attention and the output matrix stay float32.
"""

import dataclasses
import functools
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROWS, COLUMNS = 0, 1
# Rows, inputs and outputs of the product that `probe` times.
PROBED = 1024, 1024, 1024
LEAST_GAIN = 1.2  # what rounding must gain to be worth it; below, two measurements of one rate differ as much
CPU_FILE = Path("/proc/cpuinfo")


@jax.custom_vjp
def product(x_MR, weight_RN):
    """x_MR @ weight_RN in float32, each operand rounded to bfloat16; the cotangent is rounded likewise."""
    return _sum(x_MR.astype(jnp.bfloat16), weight_RN.astype(jnp.bfloat16), COLUMNS, ROWS)


def _forward(x_MR, weight_RN):
    x_MR, weight_RN = x_MR.astype(jnp.bfloat16), weight_RN.astype(jnp.bfloat16)
    # Kept transposed: a CPU has no bfloat16 product that sums over the rows of both operands, and XLA would
    # do the weight's gradient in float32.
    return _sum(x_MR, weight_RN, COLUMNS, ROWS), (x_MR.T, weight_RN)


def _backward(kept, cotangent_MN):
    x_RM, weight_RN = kept
    cotangent_MN = cotangent_MN.astype(jnp.bfloat16)
    return _sum(cotangent_MN, weight_RN, COLUMNS, COLUMNS), _sum(x_RM, cotangent_MN, COLUMNS, ROWS)


product.defvjp(_forward, _backward)


def _sum(left, right, left_axis: int, right_axis: int):
    """Sums left x right over one axis of each, in float32."""
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What products of each kind do on this machine.

    Attributes:
      float32, bfloat16: FLOP/s with float32 operands, and with those rounded to bfloat16.
      instructions: whether the CPU says that it has bfloat16 instructions; None where it does not say.
    """

    float32: float
    bfloat16: float
    instructions: bool | None

    @property
    def choice(self) -> str:
        """ModelConfig.products: bfloat16 where the CPU has the instructions and they gain something."""
        faster = self.bfloat16 >= LEAST_GAIN * self.float32
        return "bfloat16" if faster and self.instructions is not False else "compute"

    def record(self) -> dict[str, float | bool | None]:
        """The measurement as a run's versions.json keeps it, GFLOP/s."""
        return {
            "float32_products_gflops": round(self.float32 / 1e9, 1),
            "bfloat16_products_gflops": round(self.bfloat16 / 1e9, 1),
            "bfloat16_instructions": self.instructions,
        }


@functools.cache
def probe(repeats: int = 5) -> Probe:
    """Times both kinds of product in turn, best of `repeats`, once a process: about a quarter of a second."""
    rows, inputs, outputs = PROBED
    cpu = jax.local_devices(backend="cpu")[0]
    x, weight = (jax.device_put(jnp.ones(shape), cpu) for shape in ((rows, inputs), (inputs, outputs)))
    kinds = {"float32": (jax.jit(jnp.matmul), weight)}
    kinds["bfloat16"] = jax.jit(product), weight.astype(jnp.bfloat16)  # as the sampler holds its weights
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
    if not CPU_FILE.is_file():
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found[1].split())) if found else None
