"""Matrix products of a decode step: a few rows times a weight, which is read once for all rows.

XLA's CPU library streams a weight fastest if the numbers of each output are contiguous and, in float32, if
the weight is the left operand. So on a CPU the decode loop's weights are stored [out, in]. With 8 rows this
takes half of the processor time on a CPU without AVX-512, and about 85% of it with AVX-512
(docs/sampling.md).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.models.config import ModelConfig

ROWS = 32  # with more rows, the usual product is as fast


@struct.dataclass
class Columns:
    """A weight stored [out, in], for `product`.

    Attributes:
      values_NR: the weight, with its axes flattened to outputs and inputs.
      shape: the original shape of the weight: inputs, then outputs.
    """

    values_NR: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)


def decoding(platform: str) -> str:
    """The value of ModelConfig.decoding for a platform: "columns" on CPU, "rows" elsewhere."""
    return "columns" if platform == "cpu" else "rows"


def apply(config: ModelConfig, rows: int) -> bool:
    """Whether products of `rows` rows read a model's weights [out, in]."""
    return config.decoding == "columns" and rows <= ROWS


def turned(weight, inputs: int) -> Columns:
    """Stores a weight [out, in]; its first `inputs` axes are the inputs."""
    weight_RN = weight.reshape(math.prod(weight.shape[:inputs]), -1)
    return Columns(weight_RN.T, weight.shape)


def joined(first: Columns, second: Columns) -> Columns:
    """Two weights of one input as one weight: its outputs are those of the first, then of the second."""
    shape = (*first.shape[:-1], first.shape[-1] + second.shape[-1])
    return Columns(jnp.concatenate([first.values_NR, second.values_NR]), shape)


def product(x_MR, values_NR, dtype):
    """x_MR times the transpose of values_NR: [M, N] in `dtype`, summed in float32."""
    if x_MR.dtype != jnp.float32 or x_MR.shape[0] > ROWS:
        return _sum(x_MR, values_NR).astype(dtype)
    # Without the barrier the compiler swaps the operands to save the transpose.
    return jax.lax.optimization_barrier(_sum(values_NR, x_MR)).T.astype(dtype)


def _sum(left, right):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
