"""Products of float32 matrices with operands in bfloat16 and sums in float32; their gradients too.

On a CPU with bfloat16 instructions (AVX512_BF16, AMX) they may be faster than float32 products; cpu.py
measures it. Only operands are rounded. Activations, residual stream, norms, attention and the output matrix
stay float32.
"""

import jax
import jax.numpy as jnp

ROWS, COLUMNS = 0, 1


@jax.custom_vjp
def product(x_MR, weight_RN):
    """x_MR @ weight_RN in float32, each operand rounded to bfloat16; the cotangent is rounded likewise."""
    return _sum(x_MR.astype(jnp.bfloat16), weight_RN.astype(jnp.bfloat16), COLUMNS, ROWS)


def _forward(x_MR, weight_RN):
    x_MR, weight_RN = x_MR.astype(jnp.bfloat16), weight_RN.astype(jnp.bfloat16)
    # x is kept transposed. A CPU has no bfloat16 product that sums over the rows of both operands, so XLA
    # would compute the weight's gradient in float32.
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
