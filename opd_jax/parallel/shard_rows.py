"""Rows of a batch that move within the device that holds them: orders, parts, and micro-batches.

Device d of S holds rows d * B/S to (d + 1) * B/S - 1 of a batch. Functions here move rows only within such a
shard, so a compiled program moves nothing between devices for them.
"""

import jax
import jax.numpy as jnp


def count() -> int:
    """Number of shards into which the traced mesh cuts the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def order(value_B, pieces: int = 1) -> jax.Array:
    """The order of the rows of each shard by ascending value, such that pieces of `split` have similar rows.

    Args:
      value_B: what to sort by; rows with equal values keep their order.
      pieces: those of `split`; local row a * pieces + i is row a of piece i.

    Returns:
      [S, B / S] int32 row numbers within each shard.
    """
    sorted_SR = jnp.argsort(value_B.reshape(count(), -1), axis=1).astype(jnp.int32)
    place = jnp.arange(sorted_SR.shape[1]).reshape(pieces, -1).T.reshape(-1)
    return sorted_SR[:, place]


def taken(tree, order_SR):
    """The rows of [B, ...] arrays that an order names within each shard: [S R, ...], for any number R."""

    def take(x):
        cut = x.reshape(order_SR.shape[0], -1, *x.shape[1:])
        cut = jax.vmap(lambda x_R, order_R: x_R[order_R])(cut, order_SR)
        return cut.reshape(-1, *x.shape[1:])

    return jax.tree.map(take, tree)


def put_back(tree, order_SR):
    """Undoes `taken` for an order of all rows."""
    return taken(tree, jnp.argsort(order_SR, axis=1))


def split(tree, pieces: int):
    """Cuts the batch axis: [B, ...] -> [pieces, B/pieces, ...], every piece with rows of every shard."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree):
    """Undoes `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)
