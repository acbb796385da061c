"""Matrices in int8 with a float32 scale for each output channel: weight-only, symmetric, absmax.

A weight is values x scale, with scale = max |weight| / 127 over the axes that a product sums over. So the
scale can be applied after the sum: x @ weight = (x @ values) x scale. Integers up to 127 are exact in
bfloat16, and sums are float32. The compiler converts int8 to the compute dtype where a product reads it.

The same function quantises the cache's keys and values, with a scale for each token and head.

Vectors (norms, biases) and the router are not quantised: they are small, and a router's error would send
tokens to other experts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Quantised parameters, and the logical axes that their products sum over. For the embedding these are the
# axes of its use as output matrix, so that one table serves both uses and each row has one scale.
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
      scale: float32, the same shape, but 1 along the axes that a product sums over.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.values.shape


def is_quantised(weight) -> bool:
    """Whether a weight is quantised; also `is_leaf` of tree functions that take a weight as one leaf."""
    return isinstance(weight, Quantised)


def summed_axes(name: str, logical_axes) -> tuple[int, ...]:
    """Indices of the axes that products with a parameter sum over; empty if it is not quantised."""
    return tuple(i for i, axis in enumerate(logical_axes) if axis in SUMMED.get(name, ()))


def quantise(weight, summed: tuple[int, ...]):
    """Quantises a weight, or any array, to int8, with an error of at most half a scale.

    Returns the array itself if `summed` is empty. A channel of zeros gets a scale of 1.
    """
    if not summed:
        return weight
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)  # NaN stays NaN
    return Quantised(jnp.clip(jnp.round(weight / scale), -127, 127).astype(jnp.int8), scale)


def quantise_tree(params: dict, logical_axes: dict) -> dict:
    """Quantises every parameter in the way that loading a checkpoint does.

    Args:
      params: models.transformer's parameters in floating point.
      logical_axes: the same tree with a tuple of names at each leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, w, axes: quantise(w, summed_axes(path[-1].key, axes)), params, logical_axes
    )


def split_axes(logical_axes: dict) -> dict:
    """Logical axes of what `quantise_tree` returns.

    A scale is not cut along the width: it is small, and cutting it would cost a message at every use.
    """

    def scale_axes(axes, summed) -> Any:  # names, where a Quantised of arrays has an array
        return tuple(None if i in summed or axis == "embed" else axis for i, axis in enumerate(axes))

    def split(path, axes):
        summed = summed_axes(path[-1].key, axes)
        return Quantised(axes, scale_axes(axes, summed)) if summed else axes

    return jax.tree_util.tree_map_with_path(split, logical_axes, is_leaf=lambda node: isinstance(node, tuple))


def cast(weight, dtype):
    """Casts a weight to the dtype of its products; a quantised weight stays int8 until the product."""
    return weight if is_quantised(weight) else weight.astype(dtype)


def rows(table, ids, dtype):
    """Rows [..., D] of a quantised [V, D] table at integer ids, in a floating dtype."""
    return (table.values[ids].astype(jnp.float32) * table.scale[ids]).astype(dtype)


def product(x_MR, weight_RN, dtype=None):
    """x_MR @ weight_RN, the weight's axes flattened to these two by `flat`, in x's dtype.

    Args:
      dtype: of the result, if the weight is quantised; x's by default.
    """
    if not is_quantised(weight_RN):
        return x_MR @ weight_RN
    out_MN = jnp.dot(x_MR, weight_RN.values.astype(x_MR.dtype), preferred_element_type=jnp.float32)
    return (out_MN * weight_RN.scale).astype(dtype or x_MR.dtype)


def flat(weight, inputs: int):
    """Flattens a weight to [inputs, outputs]; its first `inputs` axes are the inputs."""
    return jax.tree.map(lambda w: w.reshape(math.prod(w.shape[:inputs]), -1), weight)


def product_with_rows(x_MD, table_VD):
    """float32 products of every row of x with every row of a table: [M, V]."""
    dims = (((1,), (1,)), ((), ()))
    values_VD = table_VD.values.astype(x_MD.dtype) if is_quantised(table_VD) else table_VD
    out_MV = jax.lax.dot_general(x_MD, values_VD, dims, preferred_element_type=jnp.float32)
    return out_MV * table_VD.scale.reshape(1, -1) if is_quantised(table_VD) else out_MV


def grouped_product(x_RD, weight_EDF, size_E, expert_R):
    """Rows times the matrices of their experts: [R, F] in x's dtype, undefined past the groups.

    Args:
      x_RD: rows sorted by expert.
      weight_EDF: the experts' matrices. The compiler may store one block's int8 experts in x's dtype.
      size_E: rows of each expert.
      expert_R: each row's expert; any number of at least 0 past the groups.
    """
    if not is_quantised(weight_EDF):
        return jax.lax.ragged_dot(x_RD, weight_EDF, size_E)
    values_EDF = weight_EDF.values.astype(x_RD.dtype)
    out_RF = jax.lax.ragged_dot(x_RD, values_EDF, size_E, preferred_element_type=jnp.float32)
    return (out_RF * weight_EDF.scale[:, 0].at[expert_R].get(mode="clip")).astype(x_RD.dtype)
