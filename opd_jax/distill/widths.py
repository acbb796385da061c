"""Micro-batches as wide as their rows need: rows sorted by length, a few static widths, one program.

Real responses are ragged, and a forward pass over T positions costs the same whatever is in them. So the rows
of each device are sorted by the positions that they need, cut into micro-batches of neighbours, and each
micro-batch is computed at the smallest width that holds it (`lax.switch`; the choice is made on the device).
Rows do not leave their device, and every device has long and short ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MULTIPLE = 128  # widths are multiples of it: a TPU register's lanes, and a block of splash attention


def of(config) -> tuple[int, ...]:
    """The widths of a config below rollout.max_tokens, ascending."""
    full = config.rollout.max_tokens
    rounded = {-(-int(share * full) // MULTIPLE) * MULTIPLE for share in config.train.widths}
    return tuple(sorted(width for width in rounded if width < full))


def last_position(mask_BT):
    """Positions of each row up to its last True, [B] int32."""
    t = mask_BT.shape[1]
    return jnp.where(mask_BT, jnp.arange(1, t + 1)[None], 0).max(axis=1).astype(jnp.int32)


def order(need_B, pieces: int):
    """For `taken`: an order after which `scoring.split` into pieces gives each piece rows of similar need.

    Args:
      need_B: positions that each row needs.

    Returns:
      [S, B / S] row numbers within each of the S shards that the traced mesh cuts the batch into.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    rows = need_B.shape[0] // shards
    # Local row a * pieces + i is row a of piece i.
    place = jnp.arange(rows).reshape(pieces, -1).T.reshape(-1)
    sorted_SR = jnp.argsort(need_B.reshape(shards, rows), axis=1)
    return sorted_SR[:, place].astype(jnp.int32)


def taken(tree, order_SR):
    """The rows of [B, ...] arrays in an order within each shard, as `order` returns it."""
    shards, rows = order_SR.shape

    def take(x):
        cut = x.reshape(shards, rows, *x.shape[1:])
        return jax.vmap(lambda x_R, order_R: x_R[order_R])(cut, order_SR).reshape(x.shape)

    return jax.tree.map(take, tree)


def put_back(tree, order_SR):
    """Undoes `taken`."""
    return taken(tree, jnp.argsort(order_SR, axis=1))


def narrowest(widths: Sequence[int], need_B, at_width: Callable[[int], Callable[[Any], Any]], piece):
    """at_width(w)(piece) for the smallest width w that holds the needs of all rows.

    Args:
      widths: ascending; the last holds any row.
      at_width: returns a function for each width; all must return the same shapes and dtypes.

    Returns:
      (the result, the width as float32).
    """
    if len(widths) == 1:
        return at_width(widths[0])(piece), jnp.float32(widths[0])
    static = jnp.array(widths, jnp.int32)
    choice = (need_B.max() > static[:-1]).sum()
    result = jax.lax.switch(choice, [at_width(width) for width in widths], piece)
    return result, static[choice].astype(jnp.float32)
