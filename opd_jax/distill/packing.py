"""Rows behind each other: scoring and the gradient compute tokens, and little of the padding between them.

Real responses are ragged, and a forward pass costs what its sequences hold, padding included. So the rows
of a batch (a prompt and the part of its response that matters) are laid behind each other in as few sequences
of P + T positions as hold them. A token sees only its own row. Micro-batches of these sequences are then
computed until no row is left: one compiled body, and a number of rounds that the device finds out by itself.

Rows do not leave their device. Every device makes as many rounds as the one with most tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.distill.types import Array, Rollouts, Sequences, last_position
from opd_jax.parallel import shard_rows, sharding


class Packing(struct.PyTreeNode):
    """Where each row lies; N rows in each of S shards, which have as many sequences as rows.

    Attributes:
      sequence_SN: the row's sequence within its shard.
      first_SN: where it begins there.
      slot_SN: its first response token among those of the sequence.
      prompt_SN, response_SN: its tokens; both 0 if the row is left out.
      used: scalar, sequences that hold a row, the most of all shards.
    """

    sequence_SN: Array
    first_SN: Array
    slot_SN: Array
    prompt_SN: Array
    response_SN: Array
    used: Array


def pack(prompt_mask_BP, need_BT, *, together: bool = True) -> Packing:
    """Lays the rows of each shard into sequences of P + T positions, of which T predict response tokens.

    Args:
      prompt_mask_BP: real prompt tokens.
      need_BT: what must be computed: each response up to its last True. A row without any is left out.
      together: False gives every row a sequence of its own, and computes all sequences.
    """
    shards, p, t = shard_rows.count(), prompt_mask_BP.shape[1], need_BT.shape[1]
    response_B = last_position(need_BT)
    prompt_B = jnp.where(response_B > 0, prompt_mask_BP.sum(axis=1, dtype=jnp.int32), 0)
    prompt_SN, response_SN = (x.reshape(shards, -1) for x in (prompt_B, response_B))
    if together:
        return lay(prompt_SN, response_SN, p + t, t)
    rows, zero_SN = prompt_SN.shape[1], jnp.zeros_like(prompt_SN)
    own_SN = jnp.broadcast_to(jnp.arange(rows)[None], prompt_SN.shape)
    return Packing(own_SN, zero_SN, zero_SN, prompt_SN, response_SN, jnp.int32(rows))


def lay(prompt_SN, response_SN, length: int, responses: int) -> Packing:
    """Lays rows into sequences: longest first, each into the first sequence that still has room.

    Args:
      prompt_SN, response_SN: tokens of each row of each shard.
      length, responses: positions of a sequence, and how many of them may predict a response token.
    """
    rows, whole_2 = prompt_SN.shape[1], jnp.array([length, responses], jnp.int32)
    size_SN2 = jnp.stack([prompt_SN + response_SN, response_SN], axis=-1)
    order_SN = jnp.argsort(-size_SN2[..., 0], axis=1)
    size_NS2 = jnp.take_along_axis(size_SN2, order_SN[..., None], axis=1).swapaxes(0, 1)

    def put(filled_SN2, size_S2):
        fits_SN = (filled_SN2 + size_S2[:, None] <= whole_2[None, None]).all(axis=-1)
        chosen_S = jnp.argmax(fits_SN, axis=1)
        chosen_SN1 = (jnp.arange(rows)[None] == chosen_S[:, None])[..., None]
        start_S2 = jnp.where(chosen_SN1, filled_SN2, 0).sum(axis=1)
        return filled_SN2 + jnp.where(chosen_SN1, size_S2[:, None], 0), (chosen_S, start_S2)

    filled_SN2, (chosen_NS, start_NS2) = jax.lax.scan(put, jnp.zeros_like(size_SN2), size_NS2)
    back_SN = jnp.argsort(order_SN, axis=1)
    sequence_SN, first_SN, slot_SN = (
        jnp.take_along_axis(x.swapaxes(0, 1).astype(jnp.int32), back_SN, axis=1)
        for x in (chosen_NS, start_NS2[..., 0], start_NS2[..., 1])
    )
    used = (filled_SN2[..., 0] > 0).sum(axis=1, dtype=jnp.int32).max()
    return Packing(sequence_SN, first_SN, slot_SN, prompt_SN, response_SN, used)


class Piece(struct.PyTreeNode):
    """A micro-batch of sequences.

    Attributes:
      sequences: what the models read.
      source_SX: for each response token of the sequences, its place among the N T of its shard; N T where
        there is none.
    """

    sequences: Sequences
    source_SX: Array

    def taken(self, tree):
        """The values [R, T, ...] of the sequences' response tokens, of [B, T, ...] arrays; else 0."""
        shards, t = self.source_SX.shape[0], self.sequences.place_RT.shape[1]

        def take(x):
            rest = x.shape[2:]
            flat = x.reshape(shards, -1, *rest)
            found = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(flat, self.source_SX)
            return found.reshape(-1, t, *rest)

        return jax.tree.map(take, tree)


def piece(packing: Packing, rollouts: Rollouts, number, pieces: int) -> Piece:
    """Micro-batch `number` of `pieces`, each with as many neighbouring sequences of every shard.

    Args:
      rollouts: those that `packing` was made for.
      number: from 0; may be traced.
    """
    (shards, rows), t = packing.sequence_SN.shape, rollouts.mask_BT.shape[1]
    length = rollouts.tokens_BL.shape[1]
    count = rows // pieces
    sequence_R = number * count + jnp.arange(count)
    here_SNR = (packing.sequence_SN[..., None] == sequence_R[None, None]) & (packing.prompt_SN > 0)[..., None]

    def owner(positions: int, start_SN, size_SN):
        """(the row that holds each of the sequences' positions [S, R x positions], the place in it or -1)."""
        offset_SNX = jnp.arange(positions)[None, None] - start_SN[..., None]
        inside_SNX = (offset_SNX >= 0) & (offset_SNX < size_SN[..., None])
        inside_SNRX = here_SNR[..., None] & inside_SNX[:, :, None]
        number_1N11 = jnp.arange(1, rows + 1, dtype=jnp.int32)[None, :, None, None]
        row_SX = jnp.where(inside_SNRX, number_1N11, 0).sum(axis=1).reshape(shards, -1)
        row_SX, real_SX = jnp.maximum(row_SX - 1, 0), row_SX > 0
        place_SX = jnp.tile(jnp.arange(positions), count)[None] - of_row(start_SN, row_SX)
        return row_SX, jnp.where(real_SX, place_SX, -1)

    def of_row(x_SN, row_SX):
        return jnp.take_along_axis(x_SN, row_SX, axis=1)

    row_SX, position_SX = owner(length, packing.first_SN, packing.prompt_SN + packing.response_SN)
    prompt_SX = of_row(packing.prompt_SN, row_SX)
    real_SX = position_SX >= 0
    source_SX = row_SX * length + length - t - prompt_SX + jnp.maximum(position_SX, 0)
    flat_SX = rollouts.tokens_BL.reshape(shards, -1)
    slot_SX = position_SX - prompt_SX + 1  # which of its row's response tokens a position predicts
    predicts_SX = real_SX & (slot_SX >= 0) & (slot_SX < of_row(packing.response_SN, row_SX))
    slot_SX = jnp.where(predicts_SX, of_row(packing.slot_SN, row_SX) + slot_SX, t)

    owner_SX, response_SX = owner(t, packing.slot_SN, packing.response_SN)
    place_SX = of_row(packing.first_SN + packing.prompt_SN, owner_SX) - 1 + response_SX
    written_SX = response_SX >= 0
    slots_SX = jnp.where(written_SX, jnp.tile(jnp.arange(1, t + 1), count)[None], 0)

    def sequences(x_SX):
        return x_SX.reshape(shards * count, -1)

    return Piece(
        sequences=Sequences(
            tokens_RL=sequences(jnp.where(real_SX, jnp.take_along_axis(flat_SX, source_SX, axis=1), 0)),
            row_RL=sequences(jnp.where(real_SX, row_SX + 1, 0)),
            position_RL=sequences(jnp.maximum(position_SX, 0)),
            place_RT=sequences(jnp.where(written_SX, place_SX, length)),
            slot_RL=sequences(slot_SX),
            slots=slots_SX.max(),
        ),
        source_SX=jnp.where(written_SX, owner_SX * t + response_SX, rows * t),
    )


def rounds(packing: Packing, pieces: int):
    """How many of `pieces` micro-batches hold a row; a scalar."""
    count = packing.sequence_SN.shape[1] // pieces
    return (packing.used + count - 1) // count


def put_back(packing: Packing, stacked, pieces: int):
    """The responses' values [B, T, ...] from those of all micro-batches.

    Args:
      stacked: pytree of [pieces, R, T, ...]; what lies outside the responses is without meaning, there and in
        the result.
    """
    shards, rows = packing.sequence_SN.shape

    def back(x):
        t, rest = x.shape[2], x.shape[3:]
        flat = x.reshape(pieces, shards, -1, *rest).swapaxes(0, 1).reshape(shards, rows * t, *rest)
        flat = jnp.pad(flat, [(0, 0), (0, t)] + [(0, 0)] * len(rest))
        start_SN = packing.sequence_SN * t + packing.slot_SN

        def of_row(x_X, start):
            return jax.lax.dynamic_slice_in_dim(x_X, start, t)

        found = jax.vmap(jax.vmap(of_row, (None, 0)))(flat, start_SN)
        return found.reshape(shards * rows, t, *rest)

    return jax.tree.map(back, stacked)


def summed(fn: Callable[[Piece], Any], packing: Packing, rollouts: Rollouts, pieces: int):
    """The sum of fn(micro-batch), a pytree, over the micro-batches that hold a row."""

    def add(number, total):
        return jax.tree.map(jnp.add, total, fn(piece(packing, rollouts, number, pieces)))

    shapes = jax.eval_shape(lambda: fn(piece(packing, rollouts, 0, pieces)))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, rounds(packing, pieces), add, zero)


def mapped(fn: Callable[[Piece], Any], packing: Packing, rollouts: Rollouts, pieces: int):
    """fn(micro-batch) -> (pytree of [R, T, ...], another pytree), over the micro-batches that hold a row.

    Returns:
      (the first as [B, T, ...], without meaning outside the responses; the sum of the second).
    """

    def add(number, state):
        found, total = state
        own, more = fn(piece(packing, rollouts, number, pieces))
        found = jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, number, 0), found, own
        )
        return found, jax.tree.map(jnp.add, total, more)

    own, more = jax.eval_shape(lambda: fn(piece(packing, rollouts, 0, pieces)))
    found = jax.tree.map(
        lambda x: sharding.constrain(jnp.zeros((pieces, *x.shape), x.dtype), None, "batch"), own
    )
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), more)
    found, total = jax.lax.fori_loop(0, rounds(packing, pieces), add, (found, zero))
    return put_back(packing, found, pieces), total
