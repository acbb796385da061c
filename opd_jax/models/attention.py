"""Rotary positions and grouped-query attention in plain JAX, the reference for every backend."""

import functools
import itertools

import jax
import jax.numpy as jnp

from opd_jax.models import rope
from opd_jax.models.config import ModelConfig

# Finite, so that a row of padding, which attends to nothing, has no NaN.
MASKED = -1e30
SLOT_AXES = (3, 2, 3, 3)  # the axis of slots in a layer's keys, values and their scales
SLOTS = 64  # of a block of `attend_written`: on a CPU a block's copy stays in the cache of a core

ONE_PRODUCT = 512  # the longest sequence whose scores are computed by one product
QUERIES = 128  # at most so many are in a block of a longer one
GROUPS = 4  # of blocks, at most; a block is given the keys up to the end of its group


def rope_tables(config: ModelConfig, positions_BL):
    """(cos, sin), each float32 [B, L, head_size / 2], of the rotation angles at each position."""
    frequency_C, amplitude = rope.frequencies(config.rope_theta, config.head_size, config.rope_scaling)
    angle = positions_BL[..., None].astype(jnp.float32) * frequency_C[None, None]
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def rotate(x_BLHC, tables):
    """Rotates channel pairs (c, c + head_size/2), the order of Hugging Face weights, by their angles."""
    cos, sin = (table[:, :, None] for table in tables)
    low, high = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return out.astype(x_BLHC.dtype)


def causal_mask(row_BL):
    """allowed_BLM: query l may see key m if m <= l and both are real tokens of the same row.

    Args:
      row_BL: the row that a token belongs to, from 1, and 0 at padding; or True at real tokens, of one row.
    """
    length = row_BL.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & _alike(row_BL, row_BL)


def _alike(row_BL, row_BM):
    """[B, L, M]: whether two tokens are real ones of the same row."""
    return (row_BL[:, :, None] == row_BM[:, None]) & (row_BM > 0)[:, None]


def cached(k_BLKC, v_BLKC):
    """Keys and values in the layout of `attend` and the cache: ([B, K, C, L], [B, K, L, C])."""
    return k_BLKC.transpose(0, 2, 3, 1), v_BLKC.swapaxes(1, 2)


def causal(row_BL):
    """Causal attention among the real tokens of each row, in memory linear in L.

    Above ONE_PRODUCT tokens, at most QUERIES queries of a row are computed at a time, and again in the
    backward pass, so no array of [B, H, L, L] scores exists.

    Args:
      row_BL: as for `causal_mask`; padding gives finite, meaningless values.

    Returns:
      attend(q_BLHC, k_BKCL, v_BKLC), which is `attend` with `causal_mask(row_BL)`.
    """
    if row_BL.shape[1] > ONE_PRODUCT:
        return functools.partial(_attend_in_blocks, row_BL)
    allowed_BLL = causal_mask(row_BL)
    return lambda q_BLHC, k_BKCL, v_BKLC: attend(q_BLHC, k_BKCL, v_BKLC, allowed_BLL)


def score_count(length: int) -> int:
    """Number of scores that `causal` computes for one head and row."""
    if length <= ONE_PRODUCT:
        return length**2
    size, groups = _blocks(length)
    return sum((last - first) * size * min(last * size, length) for first, last in groups)


def _blocks(length: int):
    """(queries in a block, a multiple of 8; the first block of each group and the one after its last).

    A group has at least two blocks: XLA would inline a loop of one round, and might run it beside others.
    """
    size = -(-length // (8 * -(-length // QUERIES))) * 8
    count = -(-length // size)
    groups = min(GROUPS, count // 2)
    return size, itertools.pairwise(count * i // groups for i in range(groups + 1))


def _attend_in_blocks(row_BL, q_BLHC, k_BKCL, v_BKLC):
    b, length, h, c = q_BLHC.shape
    size, groups = _blocks(length)
    room = -length % size
    q_BLHC = jnp.pad(q_BLHC, ((0, 0), (0, room), (0, 0), (0, 0)))
    q_NBRHC = q_BLHC.reshape(b, -1, size, h, c).swapaxes(0, 1)
    row_NBR = jnp.pad(row_BL, ((0, 0), (0, room))).reshape(b, -1, size).swapaxes(0, 1)

    def group(first, last):
        end = min(last * size, length)
        k_BKCM, v_BKMC, row_BM = k_BKCL[..., :end], v_BKLC[:, :, :end], row_BL[:, :end]

        @jax.checkpoint
        def block(inputs):
            i, row_BR, q_BRHC = inputs
            causal_RM = i * size + jnp.arange(size)[:, None] >= jnp.arange(end)[None]
            return attend(q_BRHC, k_BKCM, v_BKMC, causal_RM[None] & _alike(row_BR, row_BM))

        return jax.lax.map(block, (jnp.arange(first, last), row_NBR[first:last], q_NBRHC[first:last]))

    out_NBRHC = jnp.concatenate([group(*ends) for ends in groups])
    return out_NBRHC.swapaxes(0, 1).reshape(b, -1, h, c)[:, :length]


def attend(q_BLHC, k_BKCM, v_BKMC, allowed_BLM, scales_BK1M=()):
    """Softmax attention. Query heads of a group share their keys, which are not repeated.

    Args:
      q_BLHC: queries; head h belongs to kv head h // (H / K).
      k_BKCM, v_BKMC: keys (channels before slots) and values, in the cache's layout. Both products are then
        plain row-by-column products, and the cache is neither transposed nor copied.
      allowed_BLM: which keys a query may see; a row with none gives a finite, meaningless value.
      scales_BK1M: scales of int8 keys and values, (), or a pair. They multiply the scores and weights, so
        that no array of the cache's size is multiplied.

    Returns:
      [B, L, H, C] in the queries' dtype. Scores and softmax are float32.
    """
    b, l, h, c = q_BLHC.shape
    kv = k_BKCM.shape[1]
    group = h // kv
    q_BKRC = (q_BLHC * c**-0.5).reshape(b, l, kv, group, c).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, c)
    score_BKRM = _rows_by_columns(q_BKRC, k_BKCM.astype(q_BKRC.dtype), jnp.float32)
    if scales_BK1M:
        k_scale_BK1M, v_scale_BK1M = scales_BK1M
        score_BKRM = score_BKRM * k_scale_BK1M
    score = score_BKRM.reshape(b, kv, group, l, -1)
    score = jnp.where(allowed_BLM[:, None, None], score, MASKED)
    weight_BKRM = jax.nn.softmax(score, axis=-1).reshape(score_BKRM.shape)
    if scales_BK1M:
        weight_BKRM = weight_BKRM * v_scale_BK1M
    dtype = q_BLHC.dtype
    out_BKRC = _rows_by_columns(weight_BKRM.astype(dtype), v_BKMC.astype(dtype), dtype)
    return out_BKRC.reshape(b, kv, group, l, c).transpose(0, 3, 1, 2, 4).reshape(b, l, h, c)


def _rows_by_columns(left, right, dtype):
    """[B, K, R, X] times [B, K, X, Y], with the operands in this order; einsum might swap them."""
    dims = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


def attend_written(q_BRHC, layer, start_B, written, in_blocks: bool = False):
    """Attention of the newest R tokens of each row to the slots of a cache that are written, theirs included.

    Args:
      q_BRHC: the queries of the tokens in the last R written slots; a token sees no slot after its own.
      layer: what KVCache.layers holds of a layer.
      start_B: the first real slot of each row.
      written: scalar; slots from it on are empty.
      in_blocks: read the written blocks of SLOTS slots alone, one after the other; their number must divide
        that of the slots. Else all slots are read, and the empty ones masked.

    Returns:
      [B, R, H, C] in the queries' dtype.
    """
    if in_blocks and layer[0].shape[3] > SLOTS:

        def read(i):
            return tuple(
                jax.lax.dynamic_slice_in_dim(x, i * SLOTS, SLOTS, axis) for x, axis in zip(layer, SLOT_AXES)
            )

        return attend_to_blocks(q_BRHC, read, SLOTS, start_B, written)
    keys, values, *scales = layer
    slot_S = jnp.arange(keys.shape[3])
    return attend(q_BRHC, keys, values, _seen(slot_S, start_B, written, q_BRHC.shape[1]), scales)


def _seen(slot_M, start_B, written, queries: int):
    """[B, R, M]: which slots the newest R tokens of each row see."""
    last_R = written - queries + jnp.arange(queries)
    return (slot_M[None, None] >= start_B[:, None, None]) & (slot_M[None] <= last_R[:, None])[None]


def attend_to_blocks(q_BRHC, read, size: int, start_B, written):
    """`attend_written` in blocks, with a running softmax: sums are relative to the largest score so far.

    Args:
      read: read(i) -> block i of what KVCache.layers holds of a layer: slots i x size and after.
      size: slots of a block.
    """
    b, r, h, c = q_BRHC.shape
    dtype, kv = q_BRHC.dtype, jax.eval_shape(read, 0)[0].shape[1]
    # The queries of a group of heads, and of all tokens, are rows of the same products.
    q_BKNC = (q_BRHC * c**-0.5).reshape(b, r, kv, -1, c).swapaxes(1, 2).reshape(b, kv, -1, c)

    def add(i, state):
        largest_BKN1, total_BKN1, sum_BKNC = state
        keys, values, *scales = read(i)
        score_BKNM = _rows_by_columns(q_BKNC, keys.astype(dtype), jnp.float32)
        if scales:
            score_BKNM = score_BKNM * scales[0]
        allowed_BRM = _seen(i * size + jnp.arange(size), start_B, written, r)
        allowed_BNM = jnp.repeat(allowed_BRM, h // kv, axis=1)
        score_BKNM = jnp.where(allowed_BNM[:, None], score_BKNM, MASKED)
        new_BKN1 = jnp.maximum(largest_BKN1, score_BKNM.max(axis=-1, keepdims=True))
        kept_BKN1 = jnp.exp(largest_BKN1 - new_BKN1)
        weight_BKNM = jnp.exp(score_BKNM - new_BKN1)
        total_BKN1 = total_BKN1 * kept_BKN1 + weight_BKNM.sum(axis=-1, keepdims=True)
        if scales:
            weight_BKNM = weight_BKNM * scales[1]
        value_BKNC = _rows_by_columns(weight_BKNM.astype(dtype), values.astype(dtype), jnp.float32)
        return new_BKN1, total_BKN1, sum_BKNC * kept_BKN1 + value_BKNC

    of_row = (*q_BKNC.shape[:3], 1)
    first = jnp.full(of_row, MASKED), jnp.zeros(of_row), jnp.zeros(q_BKNC.shape, jnp.float32)
    _, total_BKN1, sum_BKNC = jax.lax.fori_loop(0, (written + size - 1) // size, add, first)
    out_BKNC = (sum_BKNC / total_BKN1).astype(dtype)
    return out_BKNC.reshape(b, kv, r, -1, c).swapaxes(1, 2).reshape(b, r, h, c)
