"""Matrices in int8 with a float32 scale for each output channel: weight-only, symmetric, absmax.

A weight is values x scale, where scale = max |weight| / 127 over the axes that a product sums over, so that
the scale leaves the sum: x @ weight = (x @ values) x scale. Integers up to 127 are exact in bfloat16, sums
are float32, and the compiler turns int8 into the compute dtype where the product reads it.

The cache's keys and values are quantised by the same function, with a scale for each token and head.

Vectors (norms, biases) and the router stay as they are: they are small, and a router's error would send
tokens to other experts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Quantised parameters, and the logical axes that their products sum over. The embedding's are those of its
# use as output matrix, so that one table serves both and a looked-up row has one scale.
SUMMED = {
    "embedding": ("embed",),
    "head": ("embed",),
    "query": ("embed",),
    "key": ("embed",),
    "value": ("embed",),
    "output": ("heads", "head_size"),
    "gate": ("embed",),
    "up": ("embed",),
    "down": ("ffn",),
}


@struct.dataclass
class Quantised:
    """A weight in int8; a pytree, so that scans, gathers and shardings see two arrays.

    Attributes:
      values: int8, the weight's shape, -127 to 127.
      scale: float32, the same shape with size 1 where a product sums.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.values.shape


def is_quantised(weight) -> bool:
    """For the `is_leaf` of tree functions that take a weight as one."""
    return isinstance(weight, Quantised)


def summed_axes(name: str, logical_axes) -> tuple[int, ...]:
    """Numbers of the axes that products with a parameter sum over; empty: it is not quantised."""
    return tuple(i for i, axis in enumerate(logical_axes) if axis in SUMMED.get(name, ()))


def quantise(weight, summed: tuple[int, ...]):
    """The weight, or any array, in int8, off by at most half a scale each; as it is where `summed` is empty.

    A channel of zeros gets a scale of 1, and so gives zeros.
    """
    if not summed:
        return weight
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return Quantised(jnp.clip(jnp.round(weight / scale), -127, 127).astype(jnp.int8), scale)


def quantise_tree(params: dict, logical_axes: dict) -> dict:
    """Every parameter as a checkpoint's is quantised while loading.

    Args:
      params: models.transformer's parameters in floating point.
      logical_axes: the same tree with a tuple of names at each leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, w, axes: quantise(w, summed_axes(path[-1].key, axes)), params, logical_axes
    )


def split_axes(logical_axes: dict) -> dict:
    """Logical axes of what `quantise_tree` returns.

    A scale is whole along the width: it is small, and a piece a device would cost a message a use.
    """

    def scale_axes(axes, summed) -> Any:  # names, where a Quantised of arrays has an array
        return tuple(None if i in summed or axis == "embed" else axis for i, axis in enumerate(axes))

    def split(path, axes):
        summed = summed_axes(path[-1].key, axes)
        return Quantised(axes, scale_axes(axes, summed)) if summed else axes

    return jax.tree_util.tree_map_with_path(split, logical_axes, is_leaf=lambda node: isinstance(node, tuple))


def cast(weight, dtype):
    """A weight in the dtype that products take it in; a quantised one stays int8 until then."""
    return weight if is_quantised(weight) else weight.astype(dtype)


def rows(table, ids, dtype):
    """Rows [..., D] of a quantised [V, D] table at integer ids, in a floating dtype."""
    return (table.values[ids].astype(jnp.float32) * table.scale[ids]).astype(dtype)


def product(x_MR, weight_RN, dtype=None):
    """x_MR @ weight_RN, the weight's axes flattened to these two by `flat`, in x's dtype.

    Args:
      dtype: of the result where the weight is quantised, if not x's.
    """
    if not is_quantised(weight_RN):
        return x_MR @ weight_RN
    out_MN = jnp.dot(x_MR, weight_RN.values.astype(x_MR.dtype), preferred_element_type=jnp.float32)
    return (out_MN * weight_RN.scale).astype(dtype or x_MR.dtype)


def flat(weight, inputs: int):
    """A weight as [inputs, outputs]; the first `inputs` axes are summed over."""
    return jax.tree.map(lambda w: w.reshape(math.prod(w.shape[:inputs]), -1), weight)


def product_with_rows(x_MD, table_VD):
    """float32 products of every row of x with every row of a table: [M, V]."""
    dims = (((1,), (1,)), ((), ()))
    values_VD = table_VD.values.astype(x_MD.dtype) if is_quantised(table_VD) else table_VD
    out_MV = jax.lax.dot_general(x_MD, values_VD, dims, preferred_element_type=jnp.float32)
    return out_MV * table_VD.scale.reshape(1, -1) if is_quantised(table_VD) else out_MV


def grouped_product(x_RD, weight_EDF, size_E, expert_R):
    """Rows times their expert's matrix, in x's dtype; undefined past the groups: [R, F].

    Args:
      x_RD: rows sorted by expert.
      weight_EDF: the experts' matrices. The compiler may write one block's int8 experts out in x's dtype.
      size_E: rows of each expert.
      expert_R: each row's expert; past the groups any number of at least 0.
    """
    if not is_quantised(weight_EDF):
        return jax.lax.ragged_dot(x_RD, weight_EDF, size_E)
    values_EDF = weight_EDF.values.astype(x_RD.dtype)
    out_RF = jax.lax.ragged_dot(x_RD, values_EDF, size_E, preferred_element_type=jnp.float32)
    return (out_RF * weight_EDF.scale[:, 0].at[expert_R].get(mode="clip")).astype(x_RD.dtype)
