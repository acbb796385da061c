"""A decode step's products: a few rows times a weight, which is read once for all of them.

XLA's CPU library streams a weight fastest where each output's numbers lie together and, in float32, where the
weight is the left operand. So on a CPU the decode loop's weights are stored [out, in]: with 8 rows
that takes half the processor time without AVX-512 and about 85% with it (docs/sampling.md).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

ROWS = 32  # beyond them, the usual product is as fast


@struct.dataclass
class Columns:
    """A weight stored [out, in], for `product`.

    Attributes:
      values_NR: the weight, its axes flattened to outputs and inputs.
      shape: of the weight as it was: inputs, then outputs.
    """

    values_NR: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)


def decoding(platform: str) -> str:
    """ModelConfig.decoding for devices of a platform: "columns" on CPU, "rows" elsewhere."""
    return "columns" if platform == "cpu" else "rows"


def turned(weight, inputs: int) -> Columns:
    """A weight whose first `inputs` axes are summed over, stored [out, in]."""
    weight_RN = weight.reshape(math.prod(weight.shape[:inputs]), -1)
    return Columns(weight_RN.T, weight.shape)


def joined(first: Columns, second: Columns) -> Columns:
    """Two weights of one input as one weight: its outputs are those of the first, then of the second."""
    shape = (*first.shape[:-1], first.shape[-1] + second.shape[-1])
    return Columns(jnp.concatenate([first.values_NR, second.values_NR]), shape)


def product(x_MR, values_NR, dtype):
    """x_MR times the transpose of values_NR: [M, N] in `dtype`, sums in float32."""
    if x_MR.dtype != jnp.float32 or x_MR.shape[0] > ROWS:
        return _sum(x_MR, values_NR).astype(dtype)
    # The compiler would exchange the operands to save the transpose.
    return jax.lax.optimization_barrier(_sum(values_NR, x_MR)).T.astype(dtype)


def _sum(left, right):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
